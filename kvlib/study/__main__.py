"""A whole study from its grid: plan, decode every cell, time, draw; its status, report and verification; publish.

    python -m kvlib.study charts --grid notebooks/tiny.yml --seed 0
    python -m kvlib.study publish --grid notebooks/tiny.yml --seed 0 --results results/tiny

Everything is resumable: the same command again continues. Exit codes: 0 done, 1 something failed, 2 a bad grid or
something missing, 75 another engine at work, 130 interrupted, 141 nobody reads the output.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvlib.charts.report import answer_text
from kvlib.config import load_grid
from kvlib.cost import clock
from kvlib.errors import ConfigError
from kvlib.record import locked
from kvlib.study.decode import all_faults, decode, measure_throughput, work
from kvlib.study.draw import draw, drawn, make_report, publish
from kvlib.study.layout import Study, known_fingerprints, present, timing_fingerprints
from kvlib.study.processes import StudyError, exit_code
from kvlib.study.status import cell_states, is_locked, status_text, time_left, timing_state
from kvlib.study.verify import owner, verdict_text, verify_folder


def main(prog: str = "python -m kvlib.study", grid: str = "notebooks/tiny.yml", do: Sequence[str] = ()) -> int:
    """The command. prog, grid, do: as another name of it, with another default grid and only some of what it does."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=list(do or DO), help="run: decode and nothing else; cost: of a comparison, time "
                        "a round of every arm, on an otherwise idle machine; replay: read outputs of its full cache "
                        "under every arm; work: what run starts")  # fmt: skip
    parser.add_argument("--grid", type=Path, default=Path(grid), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise; default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, help="cells at a time; default: cores // threads, or a cell a GPU")
    parser.add_argument("--results", type=Path, help="publish, cost, replay: where to; default: results/<study>")
    parser.add_argument("--folder", type=Path, help="verify: records to verify; default: the study's in --runs")
    given = parser.parse_args()

    def asked() -> int | None:
        grid, left_out = present(load_grid(given.grid))
        if given.do != "work":
            print(*left_out, sep="\n", end="\n" if left_out else "")
        study = Study(grid, given.seed, given.runs.absolute(), given.figures.absolute(), given.jobs)
        given.results = (given.results or Path("results") / grid.study).absolute()
        given.folder = given.folder and given.folder.absolute()
        os.chdir(grid.path.parent)  # a relative path in a grid is relative to the grid
        return DO[given.do](study, given)

    return exit_code(asked)


def make_charts(study: Study, given: argparse.Namespace) -> None:
    start = time.monotonic()
    with locked(study.lock, wait=False):
        decode(study, charts=True)
        measure_throughput(study)
        draw(study)
    for path in drawn(study):
        print(path)
    print(answer_text(study.figures))
    print(f"{len(study.cells)} cells, {clock(time.monotonic() - start)} in all", flush=True)


def run_cells(study: Study, given: argparse.Namespace) -> None:
    with locked(study.lock, wait=False):
        decode(study)


def make_plan(study: Study, given: argparse.Namespace) -> None:
    """Print what the study will take and what is missing, and start nothing."""
    states = cell_states(study, known_fingerprints(study))
    n_done = sum(state.state == "done" for state in states)
    print(study.plan.text(study.workers, n_done), flush=True)
    faults = all_faults(study, charts=True) if n_done < len(states) else []
    if n_done < len(states) and not faults:
        from kvlib.cell import prepare  # torch

        for model, config in study.models.items():
            print(f"decoding    {model} by the {prepare(config).step}")
    print("\n  - ".join(["\nmissing", *faults]) if faults else "\nnothing is missing")


def show_status(study: Study, given: argparse.Namespace) -> None:
    """Print how far the study is, whether or not it is running."""
    prints = known_fingerprints(study)
    cells = cell_states(study, prints)
    timings = [timing_state(study.folder, folder, marks) for folder, marks in timing_fingerprints(study).items()]
    n_running = sum(cell.state == "running" for cell in cells)
    left = time_left(cells, sum(map(study.plan.cell_seconds, study.cells.values())), n_running or study.workers)
    hint = "" if prints else "the model or the data is not here, so records are told by their config alone"
    title = f"{study.grid.study}, seed {study.seed} in {study.folder}"
    print(status_text(title, cells, timings, is_locked(study.lock) or n_running > 0, left, hint))


def verify_records(study: Study, given: argparse.Namespace) -> int:
    """Print which files of a runs or results folder are damaged or missing; the exit code is 1 if any is.

    Of a folder that is named, the grid is the one that its records were made for, whatever --grid says.
    """
    folder = given.folder or study.folder
    root = folder / "records" if (folder / "records").is_dir() else folder
    if not root.is_dir():
        raise StudyError(f"there is no folder {root}; name one with FOLDER=, or run the study first:\n"
                         f"{study.command('run')}")  # fmt: skip
    grid, seeds, whose = study.grid, {given.seed}, ""
    if given.folder:
        grid, seeds, whose = owner(root, study.grid.path.parent)
    verdict = verify_folder(root, grid, seeds)
    print(verdict_text(root, verdict, whose))
    return 0 if verdict.whole else 1


def publish_results(study: Study, given: argparse.Namespace) -> None:
    with locked(study.lock, wait=False):
        publish(study, given.results)


def show_costs(study: Study, given: argparse.Namespace) -> None:
    if study.grid.comparison is None:
        raise ConfigError(f"{study.grid.path} has no arms whose cost to compare; `charts` times its KV budgets")
    from kvlib.study.timing import measure_costs  # torch

    measure_costs(study.grid.comparison.cells, given.results)


def show_replays(study: Study, given: argparse.Namespace) -> None:
    if study.grid.comparison is None:
        raise ConfigError(f"{study.grid.path} has no arms to replay outputs under; name a comparison")
    from kvlib.replay import measure_fidelity  # torch

    measure_fidelity(study.grid.comparison.cells, given.results)


DO: dict[str, Callable] = {
    "charts": make_charts,
    "run": run_cells,
    "plan": make_plan,
    "status": show_status,
    "report": lambda study, given: print(make_report(study)),
    "verify": verify_records,
    "publish": publish_results,
    "cost": show_costs,
    "replay": show_replays,
    "work": lambda study, given: work(study),
}

if __name__ == "__main__":
    sys.exit(main())
