"""Policies compared fairly: equal budgets, protection, trigger and noise, so that only the scores differ.

    python -m kvlib.compare plan --grid notebooks/compare.yml
    python -m kvlib.compare run --grid notebooks/compare.yml
    python -m kvlib.compare publish --grid notebooks/compare.yml --results results/compare

Cells are many and short, so workers decode them in their own process, without a notebook each; a cell's folder,
samples and record are those of any other run, and the same command again continues. More samples are more seeds.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from kvlib.config import RunConfig, check_names, folder_name
from kvlib.errors import ConfigError
from kvlib.files import write_atomically
from kvlib.record import LockedError, RecordError, canonical, explained, is_done, load_samples, locked, read_record
from kvlib.study import Progress, StudyError, clock, cores, failed, tied, watch

SECONDS_PER_CELL = 15
"""Of one core, for a cell of 200 chains of the tiny reasoner; only for the first estimate."""
STAGE_KEYS = ["models", "arms", "datasets", "kv_budgets", "protect_prompt", "seeds"]


@dataclass(frozen=True)
class Cell:
    """One arm on one dataset at one KV budget; protected: the prompt is never evicted. Full cache: arm "full"."""

    model: str
    dataset: str
    arm: str
    protected: bool
    config: RunConfig

    @property
    def path(self) -> str:
        budget = "full" if self.config.kv_budget is None else f"b{self.config.kv_budget}"
        arm = f"{folder_name(self.arm)}{'+prompt' if self.protected else ''}"
        return f"{folder_name(self.model)}/{self.dataset}/{arm}/{budget}/s{self.config.seed}"


@dataclass(frozen=True)
class Comparison:
    """A comparison file: arms are a policy and its options; stages say which of them meet on which cells."""

    study: str
    cells: tuple[Cell, ...]


def load_comparison(path: Path) -> Comparison:
    """Read a comparison file (YAML). Raises ConfigError naming the file, the key and the next step."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no comparison can be read at {path} ({error.strerror}); check --grid") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return parse_comparison(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_comparison(content) -> Comparison:
    keys = ["study", "decoding", "common", "arms", "stages"]
    if not isinstance(content, Mapping) or any(key not in content for key in keys):
        raise ConfigError(f"a comparison is a mapping with the keys {', '.join(keys)}")
    check_names(content, keys, "key")
    cells: dict[str, Cell] = {}
    for stage, spec in content["stages"].items():
        check_names(spec, STAGE_KEYS, f"key of stage {stage}")
        missing = [key for key in STAGE_KEYS if key not in spec]
        if missing:
            raise ConfigError(f"stage {stage} lacks {missing[0]}; add it")
        arms = list(content["arms"]) if spec["arms"] == "all" else spec["arms"]
        for model, dataset, seed in itertools.product(spec["models"], spec["datasets"], spec["seeds"]):
            shared = {**content["decoding"], "model": model, "dataset": dataset, "seed": seed}
            full = Cell(model, dataset, "full", False, RunConfig(**shared, policy="full"))
            cells.setdefault(full.path, full)
            for arm, protected, budget in itertools.product(arms, spec["protect_prompt"], spec["kv_budgets"]):
                if arm not in content["arms"]:
                    raise ConfigError(f"stage {stage} names the arm {arm!r}; known: {', '.join(content['arms'])}")
                given = dict(content["arms"][arm])
                policy = given.pop("policy")
                options = {**content["common"], "protect_prompt": protected, **given}
                config = RunConfig(**shared, policy=policy, kv_budget=budget, policy_options=options)
                cell = Cell(model, dataset, arm, protected, config)
                cells.setdefault(cell.path, cell)
    return Comparison(content["study"], tuple(cells.values()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvlib.compare", description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=["plan", "run", "publish", "work"], help="work: what run starts, once per core")
    parser.add_argument("--grid", type=Path, default=Path("notebooks/compare.yml"), help="default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, help="cells at a time; default: one a core")
    parser.add_argument("--results", type=Path, help="publish: where to; default: results/<study>")
    given = parser.parse_args()
    try:
        grid = given.grid.absolute()
        comparison = load_comparison(grid)
        root = given.runs.absolute() / comparison.study
        results = (given.results or Path("results") / comparison.study).absolute()
        os.chdir(grid.parent)  # a relative path in a grid is relative to the grid
        cells = {root / cell.path: cell for cell in comparison.cells}
        if given.do == "work":
            return work(cells)
        with contextlib.ExitStack() as held:
            with explained(root):
                root.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(root / ".engine.lock", wait=False))
            prints = fingerprints(cells)
            if given.do == "publish":
                publish_cells(cells, prints, results)
            else:
                left = show_plan(cells, prints, given.jobs or cores())
                if given.do == "run" and left:
                    run_cells(grid, given.runs.absolute(), cells, prints, given.jobs or cores())
    except LockedError as error:
        return failed(75, f"{error}.\nWait for that study to end, or stop it, then run this again")
    except ConfigError as error:
        return failed(2, error)
    except (StudyError, RecordError) as error:
        return failed(1, error)
    except KeyboardInterrupt:
        return failed(130, "\ninterrupted; every finished sample is kept, the same command continues")
    return 0


def fingerprints(cells: Mapping[Path, Cell]) -> dict[Path, str]:
    """Of every cell, each checked first, so that a wrong setting costs seconds and not hours."""
    from kvlib.run import check, run_fingerprint

    for cell in cells.values():
        check(cell.config)
    return {folder: run_fingerprint(cell.config, "") for folder, cell in cells.items()}


def show_plan(cells: Mapping[Path, Cell], prints: Mapping[Path, str], jobs: int) -> int:
    """Print what there is to do and about how long it takes; returns the number of cells left."""
    left = [folder for folder, mark in prints.items() if not is_done(folder, mark)]
    arms = {cell.arm for cell in cells.values()}
    print(f"{len(cells)} cells of {len(arms)} arms, {len(cells) - len(left)} done")
    if left:
        seconds = len(left) * SECONDS_PER_CELL / jobs
        print(f"{len(left)} left: about {clock(seconds)} on {jobs} cores like the ones this was written on", flush=True)
    return len(left)


def run_cells(grid: Path, runs: Path, cells: Mapping[Path, Cell], prints: Mapping[Path, str], jobs: int) -> None:
    """Decode what is left in `jobs` processes. Raises StudyError naming the cells that failed."""
    log = runs / "compare-workers.log"
    progress = Progress({folder: cell.config for folder, cell in cells.items()}, dict(prints))
    arguments = ["work", "--grid", str(grid), "--runs", str(runs)]
    with open(log, "ab") as output, contextlib.ExitStack() as started:
        workers = [started.enter_context(tied("kvlib.compare", *arguments, output=output)) for _ in range(jobs)]
        for worker in workers:
            watch(worker, progress)
    failures = [folder for folder, mark in prints.items() if not is_done(folder, mark)]
    if failures:
        names = "\n".join(f"  {cells[folder].path}" for folder in failures[:10])
        raise StudyError(f"{len(failures)} cells did not finish, all samples are kept:\n{names}\nSee {log}")


def work(cells: Mapping[Path, Cell]) -> int:
    """Decode every cell that nobody else holds and that is not done; go on after one that fails."""
    from kvlib.run import run, run_fingerprint

    code = 0
    for folder, cell in cells.items():
        try:
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / ".lock", wait=False):
                if not is_done(folder, run_fingerprint(cell.config, "")):
                    started = time.monotonic()
                    results = run(cell.config, folder)["results"]
                    took = time.monotonic() - started
                    print(f"{cell.path}: {100 * results['pass_at_1']:.1f} % in {took:.0f} s", flush=True)
        except LockedError:
            continue
        except (ConfigError, RecordError, FloatingPointError, RuntimeError) as error:
            print(f"{cell.path}: {error}", flush=True)
            code = 1
    return code


def publish_cells(cells: Mapping[Path, Cell], prints: Mapping[Path, str], results: Path) -> None:
    """Write results/cells.jsonl: of every cell its config, results, cost and verdicts, and no output text.

    Raises StudyError unless all are done.
    """
    left = [cells[folder].path for folder, mark in prints.items() if not is_done(folder, mark)]
    if left:
        raise StudyError(f"{len(left)} cells are not done, the first is {left[0]}; first run `kvlib.compare run`")
    lines, sources = [], {}
    for folder, cell in cells.items():
        record = read_record(folder)
        _, samples, _ = load_samples(folder / "samples.jsonl")
        finished = {k: v for k, v in record["provenance"]["finished"].items() if k not in ("utc", "command")}
        source = canonical(finished).decode()
        sources.setdefault(source, len(sources))
        ordered = [samples[name] for name in sorted(samples, key=lambda name: [int(n) for n in name.split("/")[1:]])]
        lines.append(
            {
                "model": cell.model,
                "dataset": cell.dataset,
                "arm": cell.arm,
                "protected": cell.protected,
                "config": record["config"],
                "results": record["results"],
                "cost": record["cost"],
                "record_sha256": record["sha256"],
                "source": sources[source],
                "problems": [sample["problem"].split("/")[1] for sample in ordered],
                "correct": [int(sample["correct"]) for sample in ordered],
                "n_tokens": [sample["n_tokens"] for sample in ordered],
                "truncated": [int(sample["stop"] == "length") for sample in ordered],
            }
        )
    with explained(results):
        results.mkdir(parents=True, exist_ok=True)
        body = "".join(json.dumps(line, separators=(",", ":"), sort_keys=True) + "\n" for line in lines)
        write_atomically(results / "cells.jsonl", body.encode())
        table = {number: json.loads(text) for text, number in sources.items()}
        write_atomically(results / "sources.json", (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
    print(f"{len(lines)} cells written to {results / 'cells.jsonl'}")


def load_verdicts(results: Path) -> pd.DataFrame:
    """One row per sample of a published comparison.

    Columns: model, dataset, arm, protected, kv_budget (NaN: full cache), seed, problem, correct, n_tokens, truncated.
    """
    frames = []
    for line in (results / "cells.jsonl").read_text().splitlines():
        cell = json.loads(line)
        own = {name: cell[name] for name in ("model", "dataset", "arm", "protected")}
        own |= {"kv_budget": cell["config"]["kv_budget"], "seed": cell["config"]["seed"]}
        samples = {name: cell[name] for name in ("correct", "n_tokens", "truncated")}
        frames.append(pd.DataFrame({**own, "problem": cell["problems"], **samples}))
    return pd.concat(frames, ignore_index=True)


if __name__ == "__main__":
    sys.exit(main())
