"""Decode every cell that has no valid record, then time the datasets: what stands in the way is said first, at once.

Cells with a notebook each are run by Snakemake, which this module only watches; the cells of a comparison by worker
processes. Either way a cell's folder, samples and record are the same, and the same command again continues.
"""

import contextlib
import functools
import json
import time
import traceback
from pathlib import Path

from kvlib.config import RULES
from kvlib.cost import clock
from kvlib.errors import ConfigError
from kvlib.record import LockedError, explained, is_done, locked
from kvlib.study.cell_command import check_parameters, note_failure
from kvlib.study.gpus import visible_gpus
from kvlib.study.layout import SNAKEFILE, Study, cell_fingerprints, known_fingerprints, timing_fingerprints, unfinished
from kvlib.study.plan import model_gb
from kvlib.study.preflight import check_disk, check_gpus, check_locks, check_toolchain, find_faults
from kvlib.study.processes import Progress, StudyError, tied, watch
from kvlib.study.status import why_failed

SNAKEMAKE = (
    "--force --keep-going --retries 1 --nolock --rerun-incomplete --scheduler greedy --nocolor "
    "--profile none --workflow-profile none "  # a user's own profile is not part of the study
    "--shared-fs-usage persistence input-output software-deployment sources storage-local-copies"
)
"""Shared is all but the source cache, which would lie in the user's home."""


def decode(study: Study, charts: bool = False) -> None:
    """Run the cells that have no valid record; raises StudyError naming those that fail. charts: they follow.

    Raises ConfigError naming all that stands in the way, before anything starts.
    """
    prints = known_fingerprints(study)
    if prints is None or unfinished(prints):
        faults = all_faults(study, charts)
        if faults:
            raise ConfigError("\n  - ".join([f"{study.grid.study} cannot start yet:", *faults]))
        prints = cell_fingerprints(study)
    left = unfinished(prints)
    text = f"{len(prints) - len(left)} of {len(prints)} cells done"
    seconds, n = sum(study.plan.cell_seconds(study.cells[folder]) for folder in left), study.workers
    if seconds > 0:
        text += f"; the others take about {clock(seconds / n)}, {n} at a time, if this machine is like the plan's"
    print(text, flush=True)
    if not left:
        return
    for model in study.models:
        if "/" in model:
            from kvlib.models import fetch_model  # torch

            fetch_model(model)
    run = run_by_workers if study.grid.comparison else run_by_snakemake
    log = run(study, left, Progress(study.cells, prints))
    left = unfinished(prints)
    if left:
        raise StudyError(summary(study, left, log))


def all_faults(study: Study, charts: bool) -> list[str]:
    """What stands in the way of running the study's cells, and of drawing its charts, a sentence each."""
    from kvlib.cell import prepare  # torch

    checks = [functools.partial(prepare, config) for config in study.cells.values()]
    if charts:
        checks.append(functools.partial(check_compared, study))
    if not study.grid.comparison:
        checks.append(functools.partial(check_parameters, study.notebook, [*RULES, "folder"]))
    if study.on_gpu:
        need = study.workers, study.plan.gpu_memory_gb(), visible_gpus()
        checks += [functools.partial(check_gpus, *need), check_toolchain]
    checks.append(functools.partial(check_disk, study.folder, study.plan.disk_gb()))
    for model, config in study.models.items():
        if "/" in model:
            from kvlib.models import download_folder  # torch

            folder, gb = download_folder(model), model_gb(config)
            if folder and gb:
                checks.append(functools.partial(check_disk, folder, gb))
    checks.append(functools.partial(check_locks, study.folder))
    faults = find_faults(checks)
    if any("../" in fault for fault in faults):
        faults.append(f"(paths with ../ are seen from {study.grid.path.parent}, where the grid is)")
    return faults


def check_compared(study: Study) -> None:
    if len(study.grid.kv_budgets) + study.grid.full_cache < 2:
        raise ConfigError(
            f"the charts compare KV budgets and {study.grid.path.name} has one: add a second, or full_cache: true, or "
            f"decode without charts: {study.command('run')}"
        )


def run_by_snakemake(study: Study, folders: list[Path], progress: Progress) -> Path:
    """Run exactly these cells, whatever is there of them: their records are missing, damaged or outdated."""
    if not SNAKEFILE.exists():
        raise StudyError(f"no Snakefile at {SNAKEFILE}; run from a clone, installed with `pip install -e .`")
    options = ["--snakefile", SNAKEFILE, "--directory", study.folder, "--cores", study.workers * study.threads]
    options += SNAKEMAKE.split()
    if study.on_gpu:
        options += ["--resources", f"gpu={study.workers}"]
    # Not by --config: on its way to a job's own process Snakemake spoils paths with # : \ or ".
    asked = json.dumps({"grid": str(study.grid.path), "runs": str(study.runs), "seed": study.seed})
    targets, log = [f"{study.name(folder)}/record.json" for folder in folders], study.folder / "snakemake.log"
    with open(log, "wb") as output, tied("snakemake", *targets, *options, output=output, KVLIB_STUDY=asked) as engine:
        watch(engine, progress.line)
    return log


def run_by_workers(study: Study, folders: list[Path], progress: Progress) -> Path:
    """Decode what is left in processes, each of which takes the next cell that nobody holds."""
    asked = ["work", "--grid", study.grid.path, "--runs", study.runs, "--seed", study.seed]
    log = study.folder / "workers.log"
    with open(log, "ab") as output, contextlib.ExitStack() as started:
        count = range(study.workers)
        workers = [started.enter_context(tied("kvlib.study", *asked, output=output)) for _ in count]
        for worker in workers:
            watch(worker, progress.line)
    return log


def work(study: Study) -> int:
    """Decode every cell that nobody else holds and that is not done; go on after one that fails."""
    from kvlib.cell import run, run_fingerprints  # torch

    code = 0
    for folder, config in study.cells.items():
        name = study.name(folder)
        try:
            with locked(folder / ".lock", wait=False):
                if not is_done(folder, run_fingerprints(config)):
                    (folder / "failed.json").unlink(missing_ok=True)
                    started = time.monotonic()
                    results = run(config, folder)["results"]
                    took = time.monotonic() - started
                    print(f"{name}: {100 * results['pass_at_1']:.1f} % in {took:.0f} s", flush=True)
        except LockedError:
            continue
        except Exception as error:
            print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
            note_failure(folder, {"reason": f"{type(error).__name__}: {error}"})
            code = 1
    return code


def summary(study: Study, left: list[Path], log: Path) -> str:
    done = len(study.cells) - len(left)
    lines = [f"{len(left)} of {len(study.cells)} cells failed; the {done} others and all samples are kept."]
    lines += [f"  {study.name(folder)}: {why_failed(folder) or 'it never started'}" for folder in left[:20]]
    if not any(map(why_failed, left)):
        lines += log.read_text(errors="replace").splitlines()[-5:]
    lines += [f"Each cell's run.log and run.ipynb in {study.folder} tell more, and {log}."]
    return "\n".join([*lines, f"Then run again: {study.command('run' if study.grid.comparison else 'charts')}"])


def measure_throughput(study: Study) -> None:
    """One timing run after another, each alone on the machine; raises StudyError naming one that fails."""
    for folder, marks in timing_fingerprints(study).items():
        if is_done(folder, marks):
            continue
        dataset, log = study.timings[folder], folder / "run.log"

        def said(dataset=dataset, log=log) -> str:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("timing ")]
            return [f"timing {dataset}", *lines][-1]

        asked = ["--grid", study.grid.path, "--dataset", dataset, "--seed", study.seed, "--folder", folder]
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with open(log, "wb") as output, tied("kvlib.study.timing", *asked, output=output) as process:
                watch(process, said)
        if not is_done(folder, marks):
            raise StudyError(f"timing {dataset} failed: {why_failed(folder)}\nSee {log}; all cells are kept")
