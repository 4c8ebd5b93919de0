"""Records of kvlib.bench -> throughput against KV budget under its roofline, and the table beneath."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvlib.charts.rows import alike, intervals, texts
from kvlib.charts.sheet import GREY, INK, banner, legend, looks, sheet, style
from kvlib.charts.tables import model_title
from kvlib.errors import ConfigError
from kvlib.stats import BUSY

SCHEMAS = ("kvlib.bench/1", "kvlib.gpu-bench/1")
LLAMA_CPP = "llama.cpp"
LEVELS = {
    "full": (INK, (0, (4, 2.5))),
    "full-unpacked": (INK, ":"),
    "full-int8": (INK, "-"),
    "hf-sdpa": (GREY, (0, (1, 1.2))),
    LLAMA_CPP: (GREY, (0, (4, 2.5))),
}
"""Arms without a KV budget that are drawn as a level: colour, dashes."""
TITLES = {
    "hf-eager": "HF generate, eager attention",
    "hf-sdpa": "HF generate",
    "full": "full cache",
    LLAMA_CPP: "llama.cpp, its GGUF file",
}
PARTS = {
    "again": "measured again",
    "unfused": "a product per matrix",
    "unpacked": "weights not packed",
    "int8": "products in 8 bits",
    "eager": "no CUDA graph",
}
"""What may follow the name of one of our arms, a part that it is without, and what it says."""
CEILINGS = ("linears", "products")
"""Arms that decode nothing: the matrix products alone, as the model has them and as kvlib has them."""
PEER = "kvpress-"
ONE_PER_CHART = ("model", "weights", "device", "dtype")


def load_bench(folder: Path | str, model: str) -> pd.DataFrame:
    """One row per arm of every record of the model (*.json) in the folder, the newest where an arm was measured twice.

    Columns: model, weights, device, dtype, batch, arm, policy, kv_budget (NaN: none), tokens_per_s (all-inclusive
    steps), low, high (slowest and fastest round), live_slots (mean), roof (tokens/s at which the step's least bytes
    would take all of the copy bandwidth measured in the same call), linears (tokens/s of the linear layers alone, NaN
    if not measured), rounds, complete (bool), noise (speed of two runs of equal work over one another; NaN), evicted
    (bool: whether anything was). Raises ConfigError if there is no record of the model, or one is damaged or has a red
    gate.
    """
    folder, rows = Path(folder), []
    for path in sorted(folder.glob("*.json")):
        record = _read(path)
        if record["model"] != model:
            continue
        if not record["gate"]["holds"]:
            raise ConfigError(f"{path} has a red gate: what it timed was wrong; measure again and remove it")
        try:
            rows += [
                {"utc": record["provenance"]["utc"], **{name: record[name] for name in ONE_PER_CHART}, **row}
                for row in _arms(record)
            ]
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"{path} is damaged (no usable {error}); measure again and remove it") from error
    if not rows:
        raise ConfigError(
            f"no record of {model} in {folder.absolute()}; make one with `make bench MODEL={model} "
            f'BENCH="--out {folder}/{model}.json"`'
        )
    df = pd.DataFrame(rows).sort_values("utc", kind="stable")
    return df.drop_duplicates(["batch", "arm"], keep="last").drop(columns="utc").reset_index(drop=True)


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
        if record["schema"] in SCHEMAS:
            return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a record of kvlib.bench ({error}); remove it or measure again") from error
    raise ConfigError(f"{path} has the schema {record['schema']!r}, read are {', '.join(SCHEMAS)}; measure again")


def _arms(record: dict) -> list[dict]:
    ceilings, found = record.get("ceilings"), []
    alone = next((row["steps"] for row in record["arms"] if row["arm"] == "linears"), float("nan"))
    keeps_all = max((row["live_slots"] for row in record["arms"] if row["arm"] == "full"), default=None)
    for row in record["arms"]:
        if row["arm"] in CEILINGS:
            continue
        batch, live = row.get("batch", record.get("batch")), row["live_slots"]
        n_steps = row.get("steps_per_round") or record["steps_per_round"]
        rounds = [batch * n_steps / seconds for seconds in row["seconds"]]
        budget, policy = row["kv_budget"], row["arm"].partition("@")[0]
        moved = float("nan") if policy == LLAMA_CPP else row["bytes_per_step"]
        found.append(
            {
                "batch": batch,
                "arm": policy if budget is None else f"{policy}@{budget}",
                "policy": policy,
                "kv_budget": float("nan") if budget is None else budget,
                "tokens_per_s": row["steps"],
                "low": min(rounds),
                "high": max(rounds),
                "live_slots": live,
                "roof": batch * ceilings["copy_bandwidth"] / moved,
                "linears": alone,
                "rounds": len(rounds),
                "complete": record.get("complete", True),
                "noise": (record.get("noise") or {}).get("ratio", float("nan")),
                # Without eviction the slots grow with the steps, whatever the budget.
                "evicted": budget is None or keeps_all is None or live < keeps_all - 0.5,
            }
        )
    return found


def _policy(name: str) -> str:
    """The policy of an arm, by the name that gives it its look."""
    return name.removeprefix(PEER).removesuffix("-kvpress")


def arm_title(policy: str) -> str:
    """The name of an arm for people: "kvpress-snapkv-kvpress" is snapkv, with the settings that kvpress has, by it."""
    if policy in TITLES:
        return TITLES[policy]
    own, _, part = policy.rpartition("-")
    if part in PARTS:
        return f"{arm_title(own)}, {PARTS[part]}"
    return f"{_policy(policy)}, by kvpress" if policy.startswith(PEER) else _policy(policy)


def throughput_figure(df: pd.DataFrame) -> Figure:
    """Tokens/s against KV budget on a log axis, one panel per batch size, one line per policy, the roofline above.

    df: as load_bench returns it, of one model and machine. Whiskers span the slowest to the fastest round. What must
    not be overlooked stands in yellow: a run cut short, and policies that never evicted at their KV budget. Raises
    ConfigError for several models or machines, or where no arm has a KV budget.
    """
    alike(df, ONE_PER_CHART)
    evicting = df[df["kv_budget"].notna()]
    if evicting.empty:
        raise ConfigError("no arm has a KV budget, so there is nothing to put on the x axis; measure one, e.g. knorm")
    one, batches = df.iloc[0], sorted(df["batch"].unique())
    budgets = [int(budget) for budget in sorted(evicting["kv_budget"].unique())]
    marks = []
    for batch, here in df.groupby("batch"):
        if not here["complete"].all():
            marks.append(f"UNFINISHED at batch {batch}: {here['rounds'].min()} of the rounds that were asked for")
        if (abs(here["noise"] - 1) > BUSY).any():
            marks.append(f"NOISY at batch {batch}: two runs of equal work differ {here['noise'].iloc[0]:.2f} times")
    idle = evicting[~evicting["evicted"]]
    marks += [f"NOTHING WAS EVICTED at KV budget {budget:.0f}: {', '.join(map(arm_title, here['policy'].unique()))}"
              for budget, here in idle.groupby("kv_budget")]  # fmt: skip
    weights = "" if one["weights"] == "real" else f", {one['weights']}"
    n = df["rounds"].min()
    rounds = f"{n} rounds, whiskers: slowest to fastest" if n > 1 else "one round, so without an interval"
    linears = "HF's linear layers: alone, as the model has them. " if df["linears"].notna().any() else ""
    kvpress = "; hollow: by kvpress" if df["policy"].str.startswith(PEER).any() else ""
    notes = [
        f"{one['device']}, {one['dtype']}{weights}; {rounds}. "
        f"All-inclusive steps. Policies stand side by side at their KV budget{kvpress}. {linears}Roofline: the least "
        "bytes of a step (weights, live keys and values once) at the copy bandwidth measured in the same call."
    ]
    with style():
        fig, axes = sheet(
            banner("throughput against KV budget", model_title(one["model"])), notes, len(batches), (3.6, 3.6),
            (0.8, 0.15, 0.45, 0.6), 3, edge=3.0, marks=marks,
        )  # fmt: skip
        for ax, batch in zip(axes, batches, strict=True):
            _draw(ax, df[df["batch"] == batch], budgets)
            ax.set_title(f"batch {batch}", color=INK)
        axes[0].set_ylabel("Throughput (tokens/s, log scale)")
        legend(fig, axes, 3.0)
    return fig


def _draw(ax, here: pd.DataFrame, budgets: list[int]) -> None:
    evicting = here[here["kv_budget"].notna()]
    place = {budget: i for i, budget in enumerate(budgets)}
    roof = evicting.groupby("kv_budget")["roof"].min()
    ax.plot(roof.index.map(place), roof, color=INK, linewidth=2.2, linestyle=(0, (6, 2)), label="roofline",
            gid="roofline")  # fmt: skip
    alone = here["linears"].dropna()
    if len(alone):
        ax.axhline(alone.mean(), color=GREY, linewidth=1.3, label="HF's linear layers")
    for arm, (color, dashes) in LEVELS.items():
        for level in here.loc[here["arm"] == arm, "tokens_per_s"]:
            ax.axhline(level, color=color, linewidth=1.5, linestyle=dashes, label=arm_title(arm))
    # Side by side where several share a budget: they differ by less than their markers' size.
    most = evicting.groupby("kv_budget").size().max()
    at = evicting.groupby("kv_budget")["policy"].agg(list)
    styles = looks([_policy(name) for name in evicting["policy"]])
    for name, rows in evicting.groupby("policy", sort=False):
        rows, look = rows.sort_values("kv_budget"), styles[_policy(name)]
        if name.startswith(PEER):
            look = look | {"markerfacecolor": "white", "markeredgecolor": look["color"], "linestyle": ":"}
        x = [place[b] + 0.7 * (at[b].index(name) - (len(at[b]) - 1) / 2) / most for b in rows["kv_budget"]]
        several = rows["rounds"] > 1
        ax.vlines(np.array(x)[several], rows["low"][several], rows["high"][several], color=look["color"], linewidth=1.2)
        ax.plot(x, rows["tokens_per_s"], label=arm_title(name), **look)
    ax.set_yscale("log")
    low, high = here[["low", "tokens_per_s"]].min(axis=None), max(here["high"].max(), roof.max())

    def within(steps: Sequence[float]) -> list[float]:
        return [m * 10**k for k in range(-2, 7) for m in steps if low / 1.3 <= m * 10**k <= high * 1.2]

    few = within((1, 2, 3, 5))
    ticks = few if len(few) > 2 else within((1, 1.5, 2, 2.5, 3, 4, 5, 7))
    ax.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xticks([*place.values()], [str(budget) for budget in budgets])
    ax.set(xlabel="KV budget (slots)", xlim=(-0.6, len(budgets) - 0.4), ylim=(low / 1.3, high * 1.2))
    ax.grid(axis="y")
    ax.spines["right"].set_visible(False)


def throughput_table(df: pd.DataFrame) -> pd.DataFrame:
    """The numbers of throughput_figure as text, one row per arm, by batch and KV budget; those that keep all last."""
    df = df.sort_values(["batch", "kv_budget", "tokens_per_s"], ascending=[True, True, False], kind="stable")
    repeated, speed = df["rounds"] > 1, "Tokens/s (slowest to fastest round)"
    table = pd.DataFrame(
        {
            "Batch": texts(df["batch"]),
            "KV budget": texts(df["kv_budget"], missing="none"),
            "Arm": df["policy"].map(arm_title).tolist(),
            speed: intervals(df.assign(low=df["low"].where(repeated)), ["tokens_per_s", "low", "high"], "{:,.1f}"),
            "Mean live slots": texts(df["live_slots"]),
            "Roofline (tokens/s)": texts(df["roof"], "{:,.1f}"),
            "Of the roofline": texts(df["tokens_per_s"] / df["roof"], "{:.0%}"),
        }
    )
    if df["linears"].notna().any():
        table["Of the linear layers"] = texts(df["tokens_per_s"] / df["linears"], "{:.0%}", "not measured")
    table["KV budget"] += np.where(df["evicted"], "", " (nothing evicted)")
    table[speed] += np.where(repeated, "", " (one round)")
    return table
