"""Where one grid's cells, timing runs and charts lie for one seed, and which of its records are there."""

import contextlib
import dataclasses
import functools
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import kvlib
from kvlib.config import Grid
from kvlib.errors import ConfigError
from kvlib.record import is_done
from kvlib.study import gpus
from kvlib.study.plan import Plan

SNAKEFILE = Path(kvlib.__file__).parent.parent / "Snakefile"


class Study:
    """cells, timings: what there is to make, by folder. models: a cell of each. lock: held by the one engine at work.

    jobs: cells at a time; None: one on each GPU that can be seen, or as many as the cores carry.
    """

    def __init__(self, grid: Grid, seed: int, runs: Path, figures: Path, jobs: int | None = None):
        self.grid, self.seed, self.runs, self.jobs = grid, seed, runs, jobs
        self.folder = runs / grid.study
        self.lock = self.folder / ".engine.lock"
        self.figures = figures / grid.study / f"s{seed}"
        self.cells = {self.folder / path: config for path, config in grid.folders(seed).items()}
        self.timings = {self.folder / path: dataset for path, dataset in grid.timings(seed).items()}
        self.models = {config.model: config for config in self.cells.values()}
        self.notebook = grid.path.parent / "30_run.ipynb"
        self.charts = grid.path.parent / "40_charts.ipynb"
        self.typed = ["--grid", seen_from_here(grid.path), "--seed", str(seed)]
        if runs != Path("runs").absolute():
            self.typed += ["--runs", seen_from_here(runs)]
        self.on_gpu = any(config.device == "cuda" for config in self.cells.values())
        self.threads = max(config.threads for config in self.cells.values())

    @functools.cached_property
    def plan(self) -> Plan:
        return Plan(self.grid, self.seed)

    @functools.cached_property
    def workers(self) -> int:
        """Cells at a time."""
        return self.jobs or max(1, len(gpus.visible_gpus() or ()) if self.on_gpu else cores() // self.threads)

    def name(self, folder: Path) -> str:
        return str(folder.relative_to(self.folder))

    def command(self, do: str) -> str:
        """What a person types for this study and seed, where they stood when they named it."""
        return shlex.join([python(), "-m", "kvlib.study", do, *self.typed])


def python() -> str:
    """This Python as one types it: `make` runs one that need not be the active one, which may lack kvlib."""
    this, active = Path(sys.executable), shutil.which("python")
    return "python" if active and Path(active).parent == this.parent else seen_from_here(this)


def seen_from_here(path: Path) -> str:
    """The path as one types it in the working folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def present(grid: Grid) -> tuple[Grid, list[str]]:
    """The comparison without the cells whose model is not here, and a sentence for each such model.

    Raises ConfigError if none is here. Any other grid as it is.
    """
    if grid.comparison is None:
        return grid, []
    from kvlib.models import check_model  # torch

    cells, absent = grid.comparison.cells, {}
    for model in dict.fromkeys(cell.config.model for cell in cells):
        try:
            check_model(model)
        except ConfigError as error:
            place = os.path.relpath(grid.path.parent / model)  # a grid's paths are seen from its file
            absent[model] = (
                f"{sum(cell.config.model == model for cell in cells)} cells left out: {error}. For another training of "
                "the tiny reasoner: make tiny-model TRAIN_SEED=8, then python -m kvlib.train predictor and "
                f"python -m kvlib.train calibration, with --model and --out {place}"
            )
    cells = tuple(cell for cell in cells if cell.config.model not in absent)
    if not cells:
        raise ConfigError("\n".join(["no model of the comparison is there", *absent.values()]))
    return dataclasses.replace(grid, comparison=dataclasses.replace(grid.comparison, cells=cells)), [*absent.values()]


def cell_fingerprints(study: Study) -> dict[Path, tuple[str, ...]]:
    """What each cell's record may say (kvlib.cell.run_fingerprints). Raises ConfigError where that cannot be known."""
    from kvlib.cell import run_fingerprints  # torch

    return {folder: run_fingerprints(config) for folder, config in study.cells.items()}


def known_fingerprints(study: Study) -> dict[Path, tuple[str, ...]] | None:
    """The cells' fingerprints, None where the model, the data or what is fitted is not here."""
    with contextlib.suppress(ConfigError):
        return cell_fingerprints(study)
    return None


def timing_fingerprints(study: Study) -> dict[Path, tuple[str]]:
    if not study.timings:
        return {}
    from kvlib.study.timing import timing_fingerprint  # torch

    return {folder: (timing_fingerprint(study.grid, name, study.seed),) for folder, name in study.timings.items()}


def unfinished(prints: Mapping[Path, Collection[str]]) -> list[Path]:
    """The folders without a valid record of their fingerprints."""
    return [folder for folder, marks in prints.items() if not is_done(folder, marks)]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
