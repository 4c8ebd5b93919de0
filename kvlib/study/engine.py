"""A whole study from its grid: plan, decode every cell, time, draw; its status, report and verification; publish.

    python -m kvlib.study charts --grid notebooks/tiny.yml --seed 0
    python -m kvlib.study publish --grid notebooks/tiny.yml --seed 0 --results results/tiny

Snakemake runs the cells and this module only watches it. Everything is resumable: the same command again
continues. Exit codes: 0 done, 1 something failed, 2 a bad grid or something missing, 75 another engine at work,
130 interrupted.
"""

import argparse
import contextlib
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import kvlib
from kvlib.charts.report import report_html
from kvlib.config import Grid, RunConfig, folder_name, load_grid
from kvlib.errors import ConfigError, GpuMemoryError
from kvlib.files import write_atomically
from kvlib.record import (  # fmt: skip
    LockedError,
    RecordError,
    explained,
    is_done,
    locked,
    notebook_sha256,
    read_record,
    sha256,
)
from kvlib.study import gpus as lease
from kvlib.study.cell_command import TIED, NotebookError, check_parameters, execute_notebook
from kvlib.study.plan import estimate, load_expected, plan_text
from kvlib.study.preflight import check_disk, check_gpus, check_locks, find_faults, gpus_with_memory
from kvlib.study.status import CellState, cell_state, is_locked, seconds_left, status_text, timing_state
from kvlib.study.verify import verdict_text, verify

SNAKEFILE = Path(kvlib.__file__).parent.parent / "Snakefile"
DRAWN = (".png", ".svg", ".csv")


class StudyError(RuntimeError):
    """A study that did not come to its end; the message says what failed and what to type next."""


class Study:
    """Where one grid's cells, timing runs and charts lie for one seed."""

    def __init__(self, grid: Grid, seed: int, runs: Path, figures: Path):
        self.grid, self.seed, self.runs = grid, seed, runs
        self.folder = runs / grid.study
        self.figures = figures / grid.study / f"s{seed}"
        self.cells = {self.folder / cell.cell_path: cell for cell in grid.cells(seed)}
        timed = grid.datasets if grid.timing else []
        self.timings = {self.folder / folder_name(name) / "timing" / f"s{seed}": name for name in timed}
        self.model = next(iter(self.cells.values())).model
        self.notebook = grid.path.parent / "30_run.ipynb"
        self.charts = grid.path.parent / "40_charts.ipynb"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvlib.study", description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=list(DO))
    parser.add_argument("--grid", type=Path, default=Path("notebooks/tiny.yml"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise; default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, help="cells at a time; default: cores // threads, or a cell a GPU")
    parser.add_argument("--results", type=Path, help="publish: where to; default: results/<study>")
    parser.add_argument("--folder", type=Path, help="verify: records to verify; default: the study's in --runs")
    given = parser.parse_args()

    def asked() -> int | None:
        grid = load_grid(given.grid)
        study = Study(grid, given.seed, given.runs.absolute(), given.figures.absolute())
        given.results = (given.results or Path("results") / grid.study).absolute()
        given.folder = (given.folder or study.folder).absolute()
        os.chdir(grid.path.parent)  # a relative path in a grid is relative to the grid
        return DO[given.do](study, given)

    return exit_code(asked)


@contextlib.contextmanager
def engine(folder: Path):
    """Make the study's folder and be the only engine at work in it. Raises LockedError or RecordError."""
    with contextlib.ExitStack() as held:
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".engine.lock", wait=False))
        yield


def exit_code(command: Callable[[], int | None]) -> int:
    """Do what a command does; what a person can do something about becomes a sentence and an exit code."""
    try:
        return command() or 0
    except LockedError as error:
        return failed(75, f"{error}.\nWait for that study to end, or stop it, then run this again")
    except ConfigError as error:
        return failed(2, error)
    except (StudyError, RecordError, NotebookError, GpuMemoryError) as error:
        return failed(1, error)
    except KeyboardInterrupt:
        return failed(130, "\ninterrupted; every finished sample is kept, the same command continues")


def failed(code: int, message) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


def make_charts(study: Study, given: argparse.Namespace) -> None:
    start = time.monotonic()
    with engine(study.folder):
        decode(study, given.jobs)
        measure_throughput(study)
        draw(study)
    for path in drawn(study):
        print(path)
    print(f"{len(study.cells)} cells, {clock(time.monotonic() - start)} in all", flush=True)


def decode(study: Study, jobs: int | None) -> None:
    """Run the cells that have no valid record; raises StudyError naming those that fail.

    Raises ConfigError naming all that stands in the way, before anything starts.
    """
    prints = known_fingerprints(study)
    if prints is None or unfinished(prints):
        faults = all_faults(study, jobs)
        if faults:
            raise ConfigError("\n  - ".join([f"{study.grid.study} cannot start yet:", *faults]))
        prints = cell_fingerprints(study)
    left = unfinished(prints)
    print(f"{len(prints) - len(left)} of {len(prints)} cells done", flush=True)
    if not left:
        return
    if "/" in study.model:
        from kvlib.models import fetch_model

        fetch_model(study.model)
    check_parameters(study.notebook, [*RunConfig.__dataclass_fields__, "folder", "notebook_sha256"])
    if not SNAKEFILE.exists():
        raise StudyError(f"no Snakefile at {SNAKEFILE}; run from a clone, installed with `pip install -e .`")
    log = study.folder / "snakemake.log"
    arguments = snakemake_arguments(study, left, jobs)
    with open(log, "wb") as output, tied("snakemake", *arguments, output=output) as engine:
        watch(engine, Progress(study.cells, prints))
    left = unfinished(prints)
    if left:
        raise StudyError(summary(study, left, log))


def all_faults(study: Study, jobs: int | None) -> list[str]:
    """What stands in the way of running the study's cells and drawing its charts, a sentence each."""
    from kvlib.cell import check, check_prompts

    cells = list(study.cells.values())
    cost = estimate(study.grid, study.seed, known_problems(study))
    faults = find_faults(functools.partial(check, config) for config in cells)
    own = [functools.partial(check_timed, study.grid)]
    if not faults:  # else the same again
        own.append(functools.partial(check_prompts, cells))
    if on_gpu(study):
        gpus = gpus_with_memory()
        own.append(functools.partial(check_gpus, workers(study, jobs), cost.gpu_memory_gb, gpus))
    own.append(functools.partial(check_disk, study.folder, cost.disk_gb))
    if "/" in study.model:  # loading the module takes seconds
        from kvlib.models import download_folder

        folder, expected = download_folder(study.model), load_expected(study.grid)
        if folder and expected:
            own.append(functools.partial(check_disk, folder, expected.model_gb))
    own.append(functools.partial(check_locks, study.folder))
    return list(dict.fromkeys(faults + find_faults(own)))


def check_timed(grid: Grid) -> None:
    if grid.timing is None:
        raise ConfigError(f"the charts draw throughput and {grid.path} asks for no timing; add a timing: line to it")


def known_problems(study: Study) -> dict[str, int]:
    """How many problems a dataset has in this study, as far as the grid tells."""
    n_problems, expected = study.grid.shared.get("n_problems"), load_expected(study.grid)
    return dict.fromkeys(study.grid.datasets, n_problems) if n_problems else dict(expected.problems if expected else {})


def make_plan(study: Study, given: argparse.Namespace) -> None:
    """Print what the study will take and what is missing, and start nothing."""
    cost = estimate(study.grid, study.seed, known_problems(study))
    states = cell_states(study, known_fingerprints(study))
    n_done = sum(state.state == "done" for state in states)
    print(plan_text(study.grid, study.seed, cost, workers(study, given.jobs), n_done))
    faults = all_faults(study, given.jobs) if n_done < len(states) else []
    print("\n  - ".join(["\nmissing", *faults]) if faults else "\nnothing is missing")


def cell_states(study: Study, prints: dict[Path, str] | None) -> list[CellState]:
    problems = known_problems(study)
    lock = study.folder / ".engine.lock"
    since = lock.stat().st_mtime if is_locked(lock) else None
    states = []
    for folder, config in study.cells.items():
        n_problems = problems.get(config.dataset)
        total = n_problems and n_problems * config.n_samples
        states.append(cell_state(study.folder, folder, config, prints and prints[folder], total, since))
    return states


def show_status(study: Study, given: argparse.Namespace) -> None:
    """Print how far the study is, whether or not it is running."""
    prints = known_fingerprints(study)
    cells = cell_states(study, prints)
    marks = timing_fingerprints(study) if study.timings else {}
    timings = [timing_state(study.folder, folder, mark) for folder, mark in marks.items()]
    costs = estimate(study.grid, study.seed, known_problems(study)).costs
    planned = 3600 * sum(cost.hours for cost in costs) if all(cost.hours is not None for cost in costs) else None
    at_work = is_locked(study.folder / ".engine.lock")
    n_running = sum(cell.state == "running" for cell in cells)
    time_left = seconds_left(cells, planned, n_running or workers(study, given.jobs))
    left = f"about {clock(time_left[0])} of decoding, reckoned {time_left[1]}" if time_left and time_left[0] else ""
    hint = "" if prints else "the model or the data is not here, so records are told by their config alone"
    title = f"{study.grid.study}, seed {study.seed} in {study.folder}"
    print(status_text(title, cells, timings, at_work or n_running > 0, left, hint))


def make_report(study: Study, given: argparse.Namespace) -> None:
    """Write report.html beside the charts; of an unfinished study it says on top what is missing."""
    prints = known_fingerprints(study)
    records = [*study.cells, *study.timings]
    whole = prints is not None and not unfinished(prints) and not unfinished(timing_fingerprints(study))
    with contextlib.ExitStack() as held:
        if whole:
            draw(study)
            figures = study.figures
        else:
            figures = Path(held.enter_context(tempfile.TemporaryDirectory()))
            if any((folder / "record.json").exists() for folder in records):
                with contextlib.suppress(NotebookError):  # nothing to draw yet
                    draw_into(study, figures, allow_incomplete=True)
        page = report_html(
            study.grid,
            study.seed,
            sorted(figures.glob("*.png")),
            sorted(figures.glob("*.csv")),
            {str(folder.relative_to(study.folder)): folder for folder in records},
        )
    with explained(study.figures):
        study.figures.mkdir(parents=True, exist_ok=True)
        write_atomically(study.figures / "report.html", page.encode())
    print(study.figures / "report.html")


def verify_records(study: Study, given: argparse.Namespace) -> int:
    """Print which files of a runs or results folder are damaged or missing; the exit code is 1 if any is."""
    root = given.folder / "records" if (given.folder / "records").is_dir() else given.folder
    if not root.is_dir():
        raise StudyError(f"there is no folder {root}; name one with FOLDER=, or run the study first")
    names = {str(folder.relative_to(study.folder)): config for folder, config in study.cells.items()}
    verdict = verify(
        root, names, [str(folder.relative_to(study.folder)) for folder in study.timings], known_problems(study)
    )
    print(verdict_text(root, verdict))
    return 0 if verdict.whole else 1


def known_fingerprints(study: Study) -> dict[Path, str] | None:
    """The cells' fingerprints, None where the model, the data or what is fitted is not here."""
    try:
        return cell_fingerprints(study)
    except ConfigError:
        return None


def on_gpu(study: Study) -> bool:
    return any(config.device.startswith("cuda") for config in study.cells.values())


def workers(study: Study, jobs: int | None) -> int:
    """Cells at a time: as asked for, else one on each GPU that can be seen, or as many as the cores carry."""
    if jobs:
        return jobs
    threads = max(config.threads for config in study.cells.values())
    return max(1, len(lease.visible_gpus()) if on_gpu(study) else cores() // threads)


def cell_fingerprints(study: Study) -> dict[Path, str]:
    from kvlib.cell import run_fingerprint

    code = notebook_sha256(study.notebook)
    return {folder: run_fingerprint(config, code) for folder, config in study.cells.items()}


def timing_fingerprints(study: Study) -> dict[Path, str]:
    from kvlib.study.timing import timing_fingerprint

    return {folder: timing_fingerprint(study.grid, name, study.seed) for folder, name in study.timings.items()}


def unfinished(prints: dict[Path, str]) -> list[Path]:
    return [folder for folder, fingerprint in prints.items() if not is_done(folder, fingerprint)]


def snakemake_arguments(study: Study, folders: list[Path], jobs: int | None) -> list[str]:
    """Run exactly these cells, whatever is there of them: their records are missing, damaged or outdated."""
    threads, jobs = max(config.threads for config in study.cells.values()), workers(study, jobs)
    targets = [str(folder.relative_to(study.folder) / "record.json") for folder in folders]
    where = ["--snakefile", str(SNAKEFILE), "--directory", str(study.folder)]
    how = "--force --keep-going --retries 1 --nolock --rerun-incomplete --scheduler greedy --nocolor"
    alone = "--profile none --workflow-profile none"  # a user's own profile is not part of the study
    given = {"grid": str(study.grid.path), "runs": str(study.runs), "seed": study.seed}
    config = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items()]
    options = [*where, "--cores", str(jobs * threads), *how.split(), *alone.split()]
    if on_gpu(study):
        options += ["--resources", f"gpu={jobs}"]
    return [*targets, *options, "--config", *config]


class Progress:
    """Counts finished cells and samples from the files, so it needs no word from the engine."""

    def __init__(self, cells: dict[Path, RunConfig], prints: dict[Path, str]):
        self.prints = prints
        self.sizes = dict.fromkeys(cells, (0, 0))  # bytes read, lines seen
        per_cell = [config.n_problems and config.n_problems * config.n_samples for config in cells.values()]
        self.total = sum(per_cell) if all(per_cell) else None
        self.done_at_start = self.samples()
        self.start = time.monotonic()

    def samples(self) -> int:
        for folder, (size, lines) in self.sizes.items():
            with contextlib.suppress(OSError), open(folder / "samples.jsonl", "rb") as file:
                if self.prints[folder].encode() in file.readline():
                    file.seek(size)
                    new = file.read()
                    self.sizes[folder] = (size + len(new), lines + new.count(b"\n"))
        return sum(max(0, lines - 1) for _, lines in self.sizes.values())  # less the header

    def cells(self) -> int:
        return sum(is_published(folder, fingerprint) for folder, fingerprint in self.prints.items())

    def line(self) -> str:
        done, elapsed = self.samples(), time.monotonic() - self.start
        of = f" of {self.total:,}" if self.total else ""
        text = f"cells {self.cells()} of {len(self.prints)}, samples {done:,}{of}, {clock(elapsed)}"
        if self.total and self.done_at_start < done < self.total:
            left = elapsed * (self.total - done) / (done - self.done_at_start)
            text += f", about {clock(left)} left"
        return text


def is_published(folder: Path, fingerprint: str) -> bool:
    with contextlib.suppress(OSError):
        return fingerprint in (folder / "record.json").read_text()
    return False


def watch(process: subprocess.Popen, progress: Progress) -> None:
    """Show one progress line until the process ends: in place on a terminal, else one every 15 s."""
    terminal = sys.stdout.isatty()
    ended = False
    while not ended:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1 if terminal else 15)
            ended = True
        line = f"\r\033[2K{progress.line()}" if terminal else progress.line()
        print(line, end="" if terminal and not ended else "\n", flush=True)


def summary(study: Study, left: list[Path], log: Path) -> str:
    done = len(study.cells) - len(left)
    lines = [f"{len(left)} of {len(study.cells)} cells failed; the {done} others and all samples are kept."]
    lines += [f"  {folder.relative_to(study.folder)}: {last_line(folder / 'run.log')}" for folder in left]
    if not any((folder / "run.log").exists() for folder in left):
        lines += log.read_text(errors="replace").splitlines()[-5:]
    lines += [f"Each cell's run.log and run.ipynb in {study.folder} tell more; Snakemake's log is {log}."]
    return "\n".join([*lines, f"Then run again: {command(study)}"])


def last_line(log: Path) -> str:
    if not log.exists():
        return "it never started"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("kvlib.study.cell_command: ") if lines else "no message; was it killed?"


def measure_throughput(study: Study) -> None:
    """One timing run after another, each alone on the machine; raises StudyError naming one that fails."""
    if not study.timings:
        return
    prints = timing_fingerprints(study)
    for folder in unfinished(prints):
        dataset = study.timings[folder]
        print(f"timing {dataset}", flush=True)
        asked = ["--grid", study.grid.path, "--dataset", dataset, "--seed", study.seed, "--folder", folder]
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "run.log", "wb") as log, tied("kvlib.study.timing", *asked, output=log) as process:
                process.wait()
        if not is_done(folder, prints[folder]):
            why = last_line(folder / "run.log")
            raise StudyError(f"timing {dataset} failed: {why}\nSee {folder}/run.log; all cells are kept")


def draw(study: Study) -> None:
    """Execute the charts notebook, unless the charts at hand were drawn from the same records and code."""
    now = charts_fingerprint(study)
    if is_drawn(study, now):
        print("the charts are up to date", flush=True)
        return
    with explained(study.figures):
        study.figures.mkdir(parents=True, exist_ok=True)
        for path in drawn(study):
            path.unlink()
    draw_into(study, study.figures)
    if not drawn(study):
        raise StudyError(f"{study.charts} ran to its end and drew nothing into {study.figures}")
    with explained(study.figures):
        write_atomically(study.figures / "drawn_from", now.encode())


def draw_into(study: Study, figures: Path, **options) -> None:
    parameters = {"grid": str(study.grid.path), "records": str(study.folder), "seed": study.seed}
    parameters["published"] = str(SNAKEFILE.parent / "results" / "published")  # wherever the grid lies
    execute_notebook(study.charts, figures / "charts.ipynb", {**parameters, "figures": str(figures), **options}, {})


def charts_fingerprint(study: Study) -> str:
    code = sorted(Path(kvlib.__file__).parent.rglob("*.py"))
    records = [read_record(folder)["sha256"] for folder in [*study.cells, *study.timings]]
    texts = [study.grid.path.read_text(), notebook_sha256(study.charts), *(path.read_text() for path in code)]
    return sha256("\n".join([*records, *texts]).encode())


def is_drawn(study: Study, fingerprint: str) -> bool:
    stamp = study.figures / "drawn_from"
    return stamp.exists() and stamp.read_text() == fingerprint and drawn(study) != []


def drawn(study: Study) -> list[Path]:
    return sorted(path for path in study.figures.glob("*") if path.suffix in DRAWN)


def publish_results(study: Study, given: argparse.Namespace) -> None:
    """Copy the records (no samples) to results/records and the charts to results; only of a whole study."""
    with engine(study.folder):
        copy_results(study, given.results)


def copy_results(study: Study, results: Path) -> None:
    prints = cell_fingerprints(study) | (timing_fingerprints(study) if study.timings else {})
    if unfinished(prints) or not is_drawn(study, charts_fingerprint(study)):
        raise StudyError(f"{study.folder} is not finished, or its charts are outdated; first run:\n"
                         f"{command(study)}")  # fmt: skip
    with explained(results):
        shutil.rmtree(results / "records", ignore_errors=True)
        for folder in prints:
            target = results / "records" / folder.relative_to(study.folder)
            target.mkdir(parents=True)
            shutil.copyfile(folder / "record.json", target / "record.json")
        for path in drawn(study):
            shutil.copyfile(path, results / path.name)
    print(f"{len(prints)} records and {len(drawn(study))} chart files copied to {results}")


def command(study: Study) -> str:
    return shlex.join(
        ["python", "-m", "kvlib.study", "charts", "--grid", str(study.grid.path), "--seed", str(study.seed)]
    )


@contextlib.contextmanager
def tied(module: str, *arguments, output):
    """A Python module as a process of its own session that ends when this block or this process does."""
    command = [sys.executable, "-c", TIED, str(os.getpid()), module, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes:02}:{seconds:02}"


DO = {
    "charts": make_charts,
    "plan": make_plan,
    "status": show_status,
    "report": make_report,
    "verify": verify_records,
    "publish": publish_results,
}


if __name__ == "__main__":
    sys.exit(main())
