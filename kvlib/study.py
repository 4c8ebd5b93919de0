"""A whole study from its grid: decode every cell, time, draw; or publish what was measured.

    python -m kvlib.study charts --grid notebooks/grid.yml --seed 0
    python -m kvlib.study publish --grid notebooks/grid.yml --seed 0 --results results/tiny

Snakemake runs the cells and this module only watches it. Everything is resumable: the same command again
continues. Exit codes: 0 done, 1 something failed, 2 a bad grid, 75 another engine at work, 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import kvlib
from kvlib.cell import TIED, NotebookError, check_parameters, execute_notebook
from kvlib.config import Grid, RunConfig, load_grid
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
        self.timings = {self.folder / name / "timing" / f"s{seed}": name for name in timed}
        self.notebook = grid.path.parent / "30_run.ipynb"
        self.charts = grid.path.parent / "40_charts.ipynb"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvlib.study", description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=["charts", "publish"])
    parser.add_argument("--grid", type=Path, default=Path("notebooks/grid.yml"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise; default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, help="cells at a time; default: cores // threads, 1 on a GPU")
    parser.add_argument("--results", type=Path, help="publish: where to; default: results/<study>")
    given = parser.parse_args()

    def asked() -> None:
        grid = load_grid(given.grid)
        study = Study(grid, given.seed, given.runs.absolute(), given.figures.absolute())
        results = (given.results or Path("results") / grid.study).absolute()
        os.chdir(grid.path.parent)  # a relative path in a grid is relative to the grid
        with engine(study.folder):
            if given.do == "charts":
                make_charts(study, given.jobs)
            else:
                publish_results(study, results)

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


def make_charts(study: Study, jobs: int | None) -> None:
    start = time.monotonic()
    decode(study, jobs)
    measure_throughput(study)
    draw(study)
    for path in drawn(study):
        print(path)
    print(f"{len(study.cells)} cells, {clock(time.monotonic() - start)} in all", flush=True)


def decode(study: Study, jobs: int | None) -> None:
    """Run the cells that have no valid record; raises StudyError naming those that fail."""
    from kvlib.run import check

    for config in study.cells.values():
        check(config)
    prints = cell_fingerprints(study)
    left = unfinished(prints)
    print(f"{len(prints) - len(left)} of {len(prints)} cells done", flush=True)
    if not left:
        return
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


def cell_fingerprints(study: Study) -> dict[Path, str]:
    from kvlib.run import run_fingerprint

    code = notebook_sha256(study.notebook)
    return {folder: run_fingerprint(config, code) for folder, config in study.cells.items()}


def timing_fingerprints(study: Study) -> dict[Path, str]:
    from kvlib.timing import timing_fingerprint

    return {folder: timing_fingerprint(study.grid, name, study.seed) for folder, name in study.timings.items()}


def unfinished(prints: dict[Path, str]) -> list[Path]:
    return [folder for folder, fingerprint in prints.items() if not is_done(folder, fingerprint)]


def snakemake_arguments(study: Study, folders: list[Path], jobs: int | None) -> list[str]:
    """Run exactly these cells, whatever is there of them: their records are missing, damaged or outdated."""
    threads = max(config.threads for config in study.cells.values())
    if jobs is None:
        on_gpu = any(config.device.startswith("cuda") for config in study.cells.values())
        jobs = 1 if on_gpu else max(1, cores() // threads)
    targets = [str(folder.relative_to(study.folder) / "record.json") for folder in folders]
    where = ["--snakefile", str(SNAKEFILE), "--directory", str(study.folder)]
    how = "--force --keep-going --retries 1 --nolock --rerun-incomplete --scheduler greedy --nocolor"
    alone = "--profile none --workflow-profile none"  # a user's own profile is not part of the study
    given = {"grid": str(study.grid.path), "runs": str(study.runs), "seed": study.seed}
    config = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items()]
    options = [*where, "--cores", str(jobs * threads), *how.split(), *alone.split()]
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
    return lines[-1].removeprefix("kvlib.cell: ") if lines else "no message; was it killed?"


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
            with open(folder / "run.log", "wb") as log, tied("kvlib.timing", *asked, output=log) as process:
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
    parameters = {"grid": str(study.grid.path), "records": str(study.folder), "seed": study.seed}
    parameters["figures"] = str(study.figures)
    execute_notebook(study.charts, study.figures / "charts.ipynb", parameters, {})
    if not drawn(study):
        raise StudyError(f"{study.charts} ran to its end and drew nothing into {study.figures}")
    with explained(study.figures):
        write_atomically(study.figures / "drawn_from", now.encode())


def charts_fingerprint(study: Study) -> str:
    code = sorted(Path(kvlib.__file__).parent.glob("*.py"))
    records = [read_record(folder)["sha256"] for folder in [*study.cells, *study.timings]]
    texts = [study.grid.path.read_text(), notebook_sha256(study.charts), *(path.read_text() for path in code)]
    return sha256("\n".join([*records, *texts]).encode())


def is_drawn(study: Study, fingerprint: str) -> bool:
    stamp = study.figures / "drawn_from"
    return stamp.exists() and stamp.read_text() == fingerprint and drawn(study) != []


def drawn(study: Study) -> list[Path]:
    return sorted(path for path in study.figures.glob("*") if path.suffix in DRAWN)


def publish_results(study: Study, results: Path) -> None:
    """Copy the records (no samples) to results/records and the charts to results; only of a whole study."""
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


if __name__ == "__main__":
    sys.exit(main())
