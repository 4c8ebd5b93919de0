"""Policies compared fairly: equal budgets, protection, trigger and noise; scores differ, and what shares a keep set.

    python -m kvlib.compare plan --grid notebooks/compare.yml
    python -m kvlib.compare run --grid notebooks/compare.yml
    python -m kvlib.compare publish --grid notebooks/compare.yml --results results/compare
    python -m kvlib.compare cost --grid notebooks/compare.yml --results results/compare
    python -m kvlib.compare replay --grid notebooks/compare.yml --results results/compare

`kvlib.study` does these; what they publish is read here. More samples are more seeds.
"""

import io
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kvlib.charts.arms import arm_label
from kvlib.charts.tables import model_title
from kvlib.config import Cell, Comparison, check_names, load_grid
from kvlib.errors import ConfigError
from kvlib.stats import pass_at_1
from kvlib.study.__main__ import main
from kvlib.study.draw import published_cell
from kvlib.tasks.datasets import dataset_title

if TYPE_CHECKING:
    from kvlib.policies import Policy


def load_comparison(path: Path) -> Comparison:
    """The arms and stages of a grid file. Raises ConfigError where it has none."""
    comparison = load_grid(path).comparison
    if comparison is None:
        raise ConfigError(f"{path} has no arms and stages; name a comparison such as compare.yml")
    return comparison


def published(results: Path, name: str) -> str:
    """The text of a published file. Raises ConfigError where there is none."""
    path = results / name
    if not path.is_file():
        raise ConfigError(
            f"there is no {path.resolve()}; make it with `python -m kvlib.compare` run, then publish, cost and replay, "
            f"each with --results {results}"
        )
    return path.read_text()


def published_cells(results: Path) -> list[dict]:
    """The cells of a published comparison, as `kvlib.study.draw.published_cell` makes them."""
    return [json.loads(line) for line in published(results, "cells.jsonl").splitlines()]


def load_verdicts(results: Path) -> pd.DataFrame:
    """One row per sample of a published comparison.

    Columns: model, dataset, arm, protected, kv_budget (NaN: full cache), seed, problem, correct, n_tokens, truncated.
    """
    frames = []
    for cell in published_cells(results):
        own = {name: cell[name] for name in ("model", "dataset", "arm", "protected")}
        own |= {"kv_budget": cell["config"]["kv_budget"], "seed": cell["config"]["seed"]}
        samples = {name: cell[name] for name in ("correct", "n_tokens", "truncated")}
        frames.append(pd.DataFrame({**own, "problem": cell["problems"], **samples}))
    verdicts = pd.concat(frames, ignore_index=True)
    return verdicts.astype({"kv_budget": float, "correct": bool, "truncated": bool})


def load_replays(results: Path) -> pd.DataFrame:
    """What the replays of a published comparison found, a row per arm, KV budget and trace (kvlib.replay.fidelity)."""
    return pd.read_csv(io.StringIO(published(results, "replays.csv")))


def stage_verdicts(comparison: Comparison, stage: str, verdicts: pd.DataFrame, model: str) -> pd.DataFrame:
    """The verdicts of a stage's cells on one model, the full cache left out, as `kvlib.stats` takes them.

    verdicts: as load_verdicts returns them; arms are named as on the charts, and a seed of the noise is a sample.
    """
    spec, chosen = comparison.stages[stage], verdicts[verdicts["model"] == model]
    lists = {"arm": "arms", "dataset": "datasets", "kv_budget": "kv_budgets", "protected": "protect_prompt"}
    for column, key in {**lists, "seed": "seeds"}.items():
        chosen = chosen[chosen[column].isin(spec[key])]
    return labelled(chosen).rename(columns={"seed": "sample"})


def labelled(verdicts: pd.DataFrame) -> pd.DataFrame:
    """With the arms named as on the charts."""
    names = zip(verdicts["arm"], verdicts["protected"], strict=True)
    return verdicts.assign(arm=[arm_label(*name) for name in names])


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
    from kvlib.replay import fitted_arms  # torch

    arms = comparison.stages[stage]["arms"]
    return fitted_arms([cell for cell in comparison.cells if cell.arm in arms], model, reasoner)


def load_cells(results: Path, seeds: Collection[int] = (0,)) -> pd.DataFrame:
    """One row per model, dataset, arm, protection and KV budget of a published comparison, these seeds pooled.

    The columns that `kvlib.charts.arms` asks for: Pass@1 in percent with its 95 % interval, output length,
    truncated share, mean live slots, and, from costs.json if that was measured, microseconds per row of a round and
    seconds of one row per solved problem (tokens x step and rounds x round, over the share solved); else NaN.
    """
    timed = (results / "costs.json").exists()
    costs = {row["arm"]: row for row in json.loads(published(results, "costs.json"))["arms"]} if timed else {}
    by_cell = defaultdict(list)
    for cell in published_cells(results):
        if cell["config"]["seed"] in seeds:
            key = (cell["model"], cell["dataset"], cell["arm"], cell["protected"], cell["config"]["kv_budget"])
            by_cell[key].append(cell)
    rows = []
    for (model, dataset, arm, protected, kv_budget), pooled in by_cell.items():
        config, cost = pooled[0]["config"], pooled[0]["cost"]
        verdicts = [pair for cell in pooled for pair in zip(cell["problems"], cell["correct"], strict=True)]
        rate, low, high = pass_at_1(verdicts)
        counts = ("n_tokens", "n_rounds", "n_correct")
        n_tokens, n_rounds, n_correct = (sum(cell["results"][name] for cell in pooled) for name in counts)
        step, per_round = (costs.get(arm, {}).get(name, {}).get("median", float("nan")) for name in ("step", "round"))
        seconds = 1e-6 * (n_tokens * step + (n_rounds * per_round if n_rounds else 0))
        rows.append(
            {
                "model": model,
                "dataset": dataset_title(dataset),
                "arm": arm,
                "protected": protected,
                "kv_budget": kv_budget,
                "n_problems": len(pooled[0]["problems"]),
                "n_samples": len(pooled),
                "pass_at_1": 100 * rate,
                "pass_low": 100 * low,
                "pass_high": 100 * high,
                "mean_tokens": sum(sum(cell["n_tokens"]) for cell in pooled) / len(verdicts),
                "max_new_tokens": config["max_new_tokens"],
                "truncated_share": sum(sum(cell["truncated"]) for cell in pooled) / len(verdicts),
                "mean_live_slots": sum(cell["results"]["mean_live_slots"] for cell in pooled) / len(pooled),
                "kib_per_row": cost["kv_bytes"] / cost.get("n_rows", config["batch_size"]) / 1024,
                "seconds_per_solved": seconds / n_correct if n_correct else float("nan"),
                "round_us_per_row": per_round,
            }
        )
    return pd.DataFrame(rows).astype({"kv_budget": float})


def beside_published(
    policy: "Policy",
    arm: str,
    grid: Path,
    results: Path,
    folder: Path,
    *,
    dataset: str,
    kv_budgets: Sequence[int],
    rivals: Collection[str],
    n_problems: int | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Decode a policy of one's own on the terms of a comparison, and set it beside published arms on the same problems.

    The terms are those of its arm "random" on the tiny reasoner, the prompt protected, seed 0. Samples go to `folder`
    and are continued from there. n_problems: the first so many; None: all. Returns cells, as `kvlib.charts.arms` asks
    for them, full cache included, and verdicts, as `kvlib.stats` does; of a published arm, slots and seconds are those
    of all its problems. Raises ConfigError for what the comparison does not have, or an arm that it has.
    """
    from kvlib.cell import run

    theirs = load_comparison(grid).cells
    if arm in {cell.arm for cell in theirs}:
        raise ConfigError(f"{arm!r} is an arm of {grid} already; give your policy another name")
    check_names(dict.fromkeys(rivals), list(dict.fromkeys(cell.arm for cell in theirs if cell.protected)), "rival")
    asked = {
        (cell.config.dataset, cell.config.kv_budget): cell.config
        for cell in theirs
        if (cell.config.model, cell.arm, cell.protected, cell.config.seed) == ("tiny", "random", True, 0)
    }
    own = []
    for kv_budget in kv_budgets:
        if (dataset, kv_budget) not in asked:
            known = ", ".join(f"{name} at {budget}" for name, budget in asked)
            raise ConfigError(f"{grid} has no dataset {dataset!r} at KV budget {kv_budget}; it has {known}")
        config = replace(asked[dataset, kv_budget], policy=arm, policy_options={}, n_problems=n_problems)
        own.append((Cell(config, arm, True), folder / config.cell_path))
    for cell, place in own:
        run(cell.config, place, policy=policy)
    own = [published_cell(cell, place) for cell, place in own]
    problems, cells = set(own[0]["problems"]), []
    met = {("full", False, None), *itertools.product({*rivals, "random"}, [True], kv_budgets)}
    for cell in published_cells(results):
        here = (cell["model"], cell["dataset"], cell["config"]["seed"]) == ("tiny", dataset, 0)
        if here and (cell["arm"], cell["protected"], cell["config"]["kv_budget"]) in met:
            kept = [problem in problems for problem in cell["problems"]]
            samples = ("problems", "correct", "n_tokens", "truncated")
            cells.append({**cell, **{name: [*itertools.compress(cell[name], kept)] for name in samples}})
    (folder / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells + own))
    (folder / "costs.json").write_text(published(results, "costs.json"))
    verdicts = labelled(load_verdicts(folder).query("arm != 'full'"))
    return load_cells(folder), verdicts.assign(sample=0)


if __name__ == "__main__":
    commands = ["plan", "run", "status", "verify", "publish", "cost", "replay"]
    sys.exit(main("python -m kvlib.compare", "notebooks/compare.yml", commands))
