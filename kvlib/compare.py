"""Policies compared fairly: equal budgets, protection, trigger and noise; scores differ, and what shares a keep set.

    python -m kvlib.compare plan --grid notebooks/compare.yml
    python -m kvlib.compare run --grid notebooks/compare.yml
    python -m kvlib.compare publish --grid notebooks/compare.yml --results results/compare
    python -m kvlib.compare cost --grid notebooks/compare.yml --results results/compare

`kvlib.study` does these; what they publish is read here. More samples are more seeds.
"""

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from kvlib.charts.arms import arm_label
from kvlib.charts.tables import model_title
from kvlib.config import Comparison, load_grid
from kvlib.errors import ConfigError
from kvlib.record import load_samples
from kvlib.stats import pass_at_1
from kvlib.study.__main__ import main
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
    from kvlib.fitted import fill
    from kvlib.policies import make_policy

    policies = {}
    for cell in comparison.cells:
        if cell.protected and cell.arm in comparison.stages[stage]["arms"] and cell.arm not in policies:
            policies[cell.arm] = fill(make_policy(cell.config.policy, **cell.config.policy_options), model, reasoner)
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
                "max_new_tokens": seeds[0]["config"]["max_new_tokens"],
                "truncated_share": n_truncated / len(verdicts),
                "mean_live_slots": sum(seed["results"]["mean_live_slots"] for seed in seeds) / n,
                "kib_per_row": seeds[0]["cost"]["kv_bytes"] / seeds[0]["config"]["batch_size"] / 1024,
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
    for them, full cache included, and verdicts, as `kvlib.stats` does. Raises ConfigError for what the comparison
    does not have.
    """
    from kvlib.cell import run

    asked = {
        (cell.config.dataset, cell.config.kv_budget): cell.config
        for cell in load_comparison(grid).cells
        if (cell.config.model, cell.arm, cell.protected, cell.config.seed) == ("tiny", "random", True, 0)
    }
    for kv_budget in kv_budgets:
        if (dataset, kv_budget) not in asked:
            known = ", ".join(f"{name} at {budget}" for name, budget in asked)
            raise ConfigError(f"{grid} has no dataset {dataset!r} at KV budget {kv_budget}; it has {known}")
    terms = ["arm", "protected", "kv_budget"]
    measured = ["max_new_tokens", "mean_live_slots", "kib_per_row", "seconds_per_solved", "round_us_per_row"]
    own, costs = [], []
    for kv_budget in kv_budgets:
        config = replace(asked[dataset, kv_budget], policy=arm, policy_options={}, n_problems=n_problems)
        record = run(config, folder / config.cell_path, policy=policy)
        _, samples, _ = load_samples(folder / config.cell_path / "samples.jsonl")
        kib = record["cost"]["kv_bytes"] / record["cost"]["n_rows"] / 1024
        costs.append((arm, True, kv_budget, config.max_new_tokens, record["results"]["mean_live_slots"], kib))
        own += [
            (arm, True, kv_budget, s["problem"].split("/")[1], s["correct"], s["n_tokens"], s["stop"] == "length")
            for s in samples.values()
        ]
    own = pd.DataFrame(own, columns=[*terms, "problem", "correct", "n_tokens", "truncated"])
    rows = load_verdicts(results).query("model == 'tiny' and dataset == @dataset and seed == 0")
    met = rows["protected"] & rows["arm"].isin({*rivals, "random"}) & rows["kv_budget"].isin(kv_budgets)
    rows = pd.concat([rows[(met | (rows["arm"] == "full")) & rows["problem"].isin(own["problem"])], own])
    cells = []
    for key, cell in rows.groupby(terms, dropna=False, sort=False):
        rate, low, high = (100 * share for share in pass_at_1(zip(cell["problem"], cell["correct"], strict=True)))
        means = (cell["n_tokens"].mean(), cell["truncated"].mean())
        cells.append((*key, len(cell), rate, low, high, *means))
    names = ["n_problems", "pass_at_1", "pass_low", "pass_high", "mean_tokens", "truncated_share"]
    cells = pd.DataFrame(cells, columns=[*terms, *names]).assign(
        model="tiny", dataset=dataset_title(dataset), n_samples=1
    )
    others = load_cells(results).query("model == 'tiny' and dataset == @dataset_title(@dataset)")
    costs = pd.concat([others[[*terms, *measured]], pd.DataFrame(costs, columns=[*terms, *measured[:3]])])
    cells = cells.merge(costs.astype({"kv_budget": float}), how="left", on=terms)
    labels = [arm_label(*name) for name in zip(rows["arm"], rows["protected"], strict=True)]
    return cells, rows.assign(arm=labels, dataset=dataset, sample=0)[rows["arm"] != "full"]


if __name__ == "__main__":
    commands = ["plan", "run", "status", "verify", "publish", "cost"]
    sys.exit(main("python -m kvlib.compare", "notebooks/compare.yml", commands))
