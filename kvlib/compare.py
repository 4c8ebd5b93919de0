"""Policies compared fairly: equal budgets, protection, trigger and noise; scores differ, and what shares a keep set.

    python -m kvlib.compare plan --grid notebooks/compare.yml
    python -m kvlib.compare run --grid notebooks/compare.yml
    python -m kvlib.compare publish --grid notebooks/compare.yml --results results/compare
    python -m kvlib.compare cost --grid notebooks/compare.yml --results results/compare

Cells are many and short, so workers decode them in their own process, without a notebook each; a cell's folder,
samples and record are those of any other run, and the same command again continues. More samples are more seeds.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kvlib.charts.arms import arm_label
from kvlib.charts.tables import model_title
from kvlib.config import RunConfig, check_names, folder_name, read_yaml
from kvlib.errors import ConfigError
from kvlib.files import write_atomically
from kvlib.record import (  # fmt: skip
    LockedError,
    canonical,
    explained,
    is_done,
    load_samples,
    locked,
    provenance,
    read_record,
)
from kvlib.study.engine import Progress, StudyError, clock, cores, engine, exit_code, tied, watch
from kvlib.tasks.datasets import dataset_title
from kvlib.tasks.grade import pass_at_1

if TYPE_CHECKING:
    from kvlib.policies import Policy

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
    stages: dict[str, dict]
    cells: tuple[Cell, ...]


def load_comparison(path: Path) -> Comparison:
    """Read a comparison file (YAML). Raises ConfigError naming the file, the key and the next step."""
    content = read_yaml(path, "comparison", "check --grid")
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
    stages = {}
    for stage, spec in content["stages"].items():
        check_names(spec, STAGE_KEYS, f"key of stage {stage}")
        missing = [key for key in STAGE_KEYS if key not in spec]
        if missing:
            raise ConfigError(f"stage {stage} lacks {missing[0]}; add it")
        arms = list(content["arms"]) if spec["arms"] == "all" else spec["arms"]
        stages[stage] = {**spec, "arms": arms}
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
    return Comparison(content["study"], stages, tuple(cells.values()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvlib.compare", description=__doc__.splitlines()[0])
    parser.add_argument(
        "do",
        choices=["plan", "run", "publish", "cost", "work"],
        help="cost: time a round of every arm, on an otherwise idle machine; work: what run starts, once per core",
    )
    parser.add_argument("--grid", type=Path, default=Path("notebooks/compare.yml"), help="default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, help="cells at a time; default: one a core")
    parser.add_argument("--results", type=Path, help="publish: where to; default: results/<study>")
    given = parser.parse_args()

    def asked() -> int | None:
        grid = given.grid.absolute()
        comparison = load_comparison(grid)
        runs = given.runs.absolute()
        root = runs / comparison.study
        results = (given.results or Path("results") / comparison.study).absolute()
        os.chdir(grid.parent)  # a relative path in a grid is relative to the grid
        cells = {root / cell.path: cell for cell in present_cells(comparison, quiet=given.do == "work")}
        if given.do == "work":
            return work(cells)
        if given.do == "cost":
            return measure_costs(cells.values(), results)
        with engine(root):
            prints = fingerprints(cells)
            if given.do == "publish":
                return publish_cells(cells, prints, results)
            jobs = given.jobs or cores()
            if show_plan(cells, prints, jobs) and given.do == "run":
                run_cells(grid, runs, cells, prints, jobs)

    return exit_code(asked)


def present_cells(comparison: Comparison, quiet: bool) -> list[Cell]:
    """The cells whose model is there; says which are left out, and how to get theirs. Raises ConfigError if none is."""
    from kvlib.models import check_model

    absent = {}
    for model in dict.fromkeys(cell.model for cell in comparison.cells):
        try:
            check_model(model)
        except ConfigError as error:
            absent[model] = error
    for model, error in absent.items():
        if not quiet:
            n = sum(cell.model == model for cell in comparison.cells)
            print(
                f"{n} cells left out: {error}. For another training of the tiny reasoner: make tiny-model "
                "TRAIN_SEED=8, then python -m kvlib.train predictor and python -m kvlib.train calibration, with "
                f"--model and --out {model}"
            )
    cells = [cell for cell in comparison.cells if cell.model not in absent]
    if not cells:
        raise ConfigError("no model of the comparison is there")
    return cells


def fingerprints(cells: Mapping[Path, Cell]) -> dict[Path, str]:
    """Of every cell, each checked first, so that a wrong setting costs seconds and not hours."""
    from kvlib.cell import check, run_fingerprint

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
    from kvlib.cell import run, run_fingerprint

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
        except Exception:
            print(f"{cell.path} failed:\n{traceback.format_exc()}", flush=True)
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


COST_ROWS, COST_STEPS, COST_REPEATS = 64, 96, 3


def costed_cells(cells: Iterable[Cell]) -> dict[str, RunConfig]:
    """By arm, the cell to time: of the first model, dataset and seed, at the middle of the budgets that all arms have.

    The prompt is protected. Raises ConfigError if the arms have no budget in common.
    """
    cells = list(cells)
    key = (cells[0].model, cells[0].dataset, cells[0].config.seed)
    ours = [cell for cell in cells if (cell.model, cell.dataset, cell.config.seed) == key]
    evicting = [cell for cell in ours if cell.protected]
    budgets = {arm: {c.config.kv_budget for c in evicting if c.arm == arm} for arm in {c.arm for c in evicting}}
    common = sorted(set.intersection(*budgets.values())) if budgets else []
    if not common:
        raise ConfigError(f"the arms of {key[1]} have no KV budget in common to be timed at; give one stage all arms")
    middle = common[len(common) // 2]
    return {c.arm: c.config for c in ours if c.arm == "full" or (c.protected and c.config.kv_budget == middle)}


def measure_costs(cells: Iterable[Cell], results: Path) -> None:
    """Time a step and a round of every arm, interleaved, and write results/costs.json; use all cores, run it alone.

    Each arm decodes 64 rows under costed_cells' config until every row has had a round, then 96 steps are timed. Of
    three repeats in turn: median, lowest and highest microseconds per row of a step (forward and sampling) and of a
    round (scoring, selecting, compacting).
    """
    import torch

    from kvlib.cell import build_decoder, check, requests_of
    from kvlib.engine.meter import Meter
    from kvlib.models import load_reasoner
    from kvlib.tasks.datasets import load_problems

    arms = costed_cells(cells)
    config = next(config for arm, config in arms.items() if arm != "full")
    reasoner = load_reasoner(config.model)
    problems = load_problems(config.dataset, COST_ROWS)
    warm_up = config.kv_budget
    measured: dict[str, list[tuple[float, float | None]]] = {arm: [] for arm in arms}
    for repeat in range(COST_REPEATS + 1):
        for arm, its in arms.items():
            check(its)
            requests = requests_of(its, problems, reasoner)
            decoder = build_decoder(
                its, reasoner, requests, n_rows=COST_ROWS, max_new_tokens=warm_up + COST_STEPS + 1, eos_ids=()
            )
            for row, request in enumerate(requests):
                decoder.admit(row, request)
            for _ in range(warm_up):
                decoder.step()
            before, decoder.meter = sum(map(len, decoder.rounds_at)), Meter(its.device)
            for _ in range(COST_STEPS):
                decoder.step()
            seconds, rounds = decoder.meter.seconds(), sum(map(len, decoder.rounds_at)) - before
            per_step = 1e6 * (seconds["forward"] + seconds["sample"]) / COST_ROWS / COST_STEPS
            if repeat:  # the first is a warm-up
                measured[arm].append((per_step, 1e6 * seconds["evict"] / rounds if rounds else None))
        print(f"repeat {repeat} of {COST_REPEATS}", flush=True)
    rows = []
    for arm, values in measured.items():
        row = {"arm": arm}
        for name, numbers in zip(("step", "round"), zip(*values, strict=True), strict=True):
            if None not in numbers:
                row[name] = {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}
        rows.append(row)
    setting = {
        "kv_budget": config.kv_budget, "dataset": config.dataset, "rows": COST_ROWS, "steps": COST_STEPS,
        "repeats": COST_REPEATS, "threads": torch.get_num_threads(), "unit": "microseconds per row",
    }  # fmt: skip
    body = {"setting": setting, "provenance": provenance(), "arms": rows}
    with explained(results):
        results.mkdir(parents=True, exist_ok=True)
        write_atomically(results / "costs.json", (json.dumps(body, indent=1) + "\n").encode())
    print(f"wrote {results / 'costs.json'}")


def published(results: Path, name: str) -> str:
    """The text of a published file. Raises ConfigError where there is none."""
    path = results / name
    if not path.is_file():
        raise ConfigError(
            f"there is no {path.resolve()}; make it with `python -m kvlib.compare` run, then publish and cost, each "
            f"with --results {results}"
        )
    return path.read_text()


def load_verdicts(results: Path) -> pd.DataFrame:
    """One row per sample of a published comparison.

    Columns: model, dataset, arm, protected, kv_budget (NaN: full cache), seed, problem, correct, n_tokens, truncated.
    """
    frames = []
    for line in published(results, "cells.jsonl").splitlines():
        cell = json.loads(line)
        own = {name: cell[name] for name in ("model", "dataset", "arm", "protected")}
        own |= {"kv_budget": cell["config"]["kv_budget"], "seed": cell["config"]["seed"]}
        samples = {name: cell[name] for name in ("correct", "n_tokens", "truncated")}
        frames.append(pd.DataFrame({**own, "problem": cell["problems"], **samples}))
    verdicts = pd.concat(frames, ignore_index=True)
    return verdicts.astype({"kv_budget": float, "correct": bool, "truncated": bool})


def stage_verdicts(comparison: Comparison, stage: str, verdicts: pd.DataFrame, model: str) -> pd.DataFrame:
    """The verdicts of a stage's cells on one model, the full cache left out, as `kvlib.stats` takes them.

    verdicts: as load_verdicts returns them; arms are named as on the charts, and a seed of the noise is a sample.
    """
    spec = comparison.stages[stage]
    chosen = verdicts[
        (verdicts["model"] == model)
        & verdicts["arm"].isin(spec["arms"])
        & verdicts["dataset"].isin(spec["datasets"])
        & verdicts["kv_budget"].isin(spec["kv_budgets"])
        & verdicts["protected"].isin(spec["protect_prompt"])
        & verdicts["seed"].isin(spec["seeds"])
    ]
    names = [arm_label(arm, protected) for arm, protected in zip(chosen["arm"], chosen["protected"], strict=True)]
    return chosen.assign(arm=names).rename(columns={"seed": "sample"})


def stage_cells(comparison: Comparison, stage: str, cells: pd.DataFrame, model: str, protected: bool) -> pd.DataFrame:
    """The rows of load_cells that belong to a stage's arms on one model, with the full cache."""
    spec = comparison.stages[stage]
    titles = [dataset_title(name) for name in spec["datasets"]]
    ours = cells["arm"].isin(spec["arms"]) & (cells["protected"] == protected)
    ours &= cells["kv_budget"].isin(spec["kv_budgets"])
    full = cells["arm"] == "full"
    chosen = cells[(cells["model"] == model) & cells["dataset"].isin(titles) & (ours | full)]
    return chosen.assign(model=model_title(model)).sort_values("dataset", kind="stable")


def stage_policies(comparison: Comparison, stage: str, model: str, reasoner) -> "dict[str, Policy]":
    """The policies of a stage's arms with the prompt protected, fitted to the reasoner, by arm."""
    from kvlib.fitted import fit
    from kvlib.policies import make_policy

    policies = {}
    for cell in comparison.cells:
        if cell.protected and cell.arm in comparison.stages[stage]["arms"] and cell.arm not in policies:
            policies[cell.arm] = fit(make_policy(cell.config.policy, **cell.config.policy_options), model, reasoner)
    return policies


def load_cells(results: Path, seeds: Collection[int] = (0,)) -> pd.DataFrame:
    """One row per model, dataset, arm, protection and KV budget of a published comparison, these seeds pooled.

    The columns that `kvlib.charts.arms` asks for: Pass@1 in percent with its 95 % interval, output length,
    truncated share, mean live slots, and, from costs.json, microseconds per row of a round and seconds of one row per
    solved problem (tokens x step and rounds x round, over the share solved).
    """
    costs = {row["arm"]: row for row in json.loads(published(results, "costs.json"))["arms"]}
    by_cell: dict[tuple, list[dict]] = {}
    for line in published(results, "cells.jsonl").splitlines():
        seed = json.loads(line)
        if seed["config"]["seed"] not in seeds:
            continue
        key = (seed["model"], seed["dataset"], seed["arm"], seed["protected"], seed["config"]["kv_budget"])
        by_cell.setdefault(key, []).append(seed)
    rows = []
    for (model, dataset, arm, protected, kv_budget), seeds in by_cell.items():
        n, cost = len(seeds), costs[arm]
        verdicts = [pair for seed in seeds for pair in zip(seed["problems"], seed["correct"], strict=True)]
        rate, low, high = pass_at_1(verdicts)
        n_tokens, n_rounds, n_truncated, n_correct = (
            sum(seed["results"][name] for seed in seeds)
            for name in ("n_tokens", "n_rounds", "n_truncated", "n_correct")
        )
        per_round = cost["round"]["median"] if "round" in cost else float("nan")
        seconds = 1e-6 * (n_tokens * cost["step"]["median"] + (n_rounds * per_round if n_rounds else 0))
        rows.append(
            {
                "model": model,
                "dataset": dataset_title(dataset),
                "arm": arm,
                "protected": protected,
                "kv_budget": kv_budget,
                "n_problems": len(seeds[0]["problems"]),
                "n_samples": n,
                "pass_at_1": 100 * rate,
                "pass_low": 100 * low,
                "pass_high": 100 * high,
                "mean_tokens": n_tokens / len(verdicts),
                "truncated_share": n_truncated / len(verdicts),
                "mean_live_slots": sum(seed["results"]["mean_live_slots"] for seed in seeds) / n,
                "kib_per_row": seeds[0]["cost"]["kv_bytes"] / seeds[0]["config"]["batch_size"] / 1024,
                "seconds_per_solved": seconds / n_correct if n_correct else float("nan"),
                "round_us_per_row": per_round,
            }
        )
    return pd.DataFrame(rows).astype({"kv_budget": float})


if __name__ == "__main__":
    sys.exit(main())
