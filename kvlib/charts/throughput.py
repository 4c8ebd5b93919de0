"""Records of kvlib.bench -> throughput against KV budget under its roofline, and the table beneath.

Never imports torch or pyplot.
"""

import json
import textwrap
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from kvlib.charts.arms import COLORS, MARKERS
from kvlib.charts.measured import GREY, INK, dress, style
from kvlib.errors import ConfigError

SCHEMAS = ("kvlib.bench/1", "kvlib.gpu-bench/1")
LEVELS = {"full": ("full cache", INK, "-"), "hf-sdpa": ("HF generate", GREY, (0, (1, 1.2)))}
"""Arms without a KV budget that are drawn as a level: label, colour, dashes."""
TITLES = {
    "hf-eager": "HF generate, eager attention",
    "hf-sdpa": "HF generate",
    "full": "full cache",
    "full-again": "full cache, measured again",
    "full-unfused": "full cache, a product per matrix",
    "full-unpacked": "full cache, weights not packed",
    "full-eager": "full cache, no CUDA graph",
}
CEILINGS = ("linears", "products")
"""Arms that decode nothing: the matrix products alone, as the model has them and as kvlib has them."""
PEER = "kvpress-"
ONE_PER_CHART = ("model", "weights", "device", "dtype")


def load_bench(folder: Path | str, model: str) -> pd.DataFrame:
    """One row per arm of every record of the model (*.json) in the folder, the newest where an arm was measured twice.

    Columns: model, weights, device, dtype, batch, arm, policy, kv_budget (NaN: none), tokens_per_s (all-inclusive
    steps), low, high (slowest and fastest round), live_slots (mean), roof (tokens/s at which the step's least bytes
    would take all of the copy bandwidth measured in the same call), linears (tokens/s of the linear layers alone, NaN
    if not measured). Raises ConfigError if there is no record of the model, or one is damaged or has a red gate.
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
    for row in record["arms"]:
        if row["arm"] in CEILINGS:
            continue
        batch, live = row.get("batch", record.get("batch")), row["live_slots"]
        rounds = [batch * _steps(record, row) / seconds for seconds in row["seconds"]]
        budget, policy = row["kv_budget"], row["arm"].partition("@")[0]
        moved = ceilings["weight_bytes"] + ceilings["kv_bytes_per_token"] * batch * live
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
                "linears": row.get("linears", alone),
            }
        )
    return found


def _steps(record: dict, row: dict) -> int:
    return row.get("steps_per_round") or record["steps_per_round"]


def arm_title(policy: str) -> str:
    """The name of an arm for people: "kvpress-snapkv-kvpress" is snapkv, with the settings that kvpress has, by it."""
    if policy in TITLES:
        return TITLES[policy]
    name = policy.removeprefix(PEER).removesuffix("-kvpress")
    return f"{name}, by kvpress" if policy.startswith(PEER) else name


def throughput_figure(df: pd.DataFrame) -> Figure:
    """Tokens/s against KV budget, one panel per batch size, one line per policy, the roofline above.

    df: as load_bench returns it, of one model and machine. Whiskers span the slowest to the fastest round. Raises
    ConfigError for several models or machines, or where no arm has a KV budget.
    """
    for name in ONE_PER_CHART:
        if df[name].nunique() != 1:
            raise ConfigError(f"one {name} per chart, got {', '.join(map(str, df[name].unique()))}; pass one at a time")
    evicting = df[df["kv_budget"].notna()]
    policies = list(evicting["policy"].unique())
    if not policies or len(policies) > len(MARKERS):
        raise ConfigError(f"a chart holds 1 to {len(MARKERS)} policies with a KV budget, got {len(policies)}")
    one = df.iloc[0]
    weights = "" if one["weights"] == "real" else f", {one['weights']}"
    notes = [
        f"{one['device']}, {one['dtype']}{weights}. All-inclusive steps; whiskers: slowest to fastest round; policies "
        "stand side by side at their KV budget. HF's linear layers: alone, as the model has them. Roofline: the least "
        "bytes of a step (weights, live keys and values once) at the copy bandwidth measured in the same call."
    ]
    batches = sorted(df["batch"].unique())
    looks = {
        name: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i],
            # The peer's markers are hollow.
            "markerfacecolor": "white" if name.startswith(PEER) else COLORS[i % len(COLORS)],
        }
        for i, name in enumerate(policies)
    }
    with style():
        width = 3.9 * len(batches) + 2.2
        lines = [line for note in notes for line in textwrap.wrap(note, int(width * 12.6))]
        height = 4.6 + 0.21 * len(lines)
        fig = Figure(figsize=(width, height), dpi=100, facecolor="white")
        axes = fig.subplots(1, len(batches), squeeze=False)[0]
        fig.subplots_adjust(
            left=0.8 / width,
            right=1 - 2.25 / width,
            wspace=0.28,
            bottom=(0.75 + 0.21 * len(lines)) / height,
            top=1 - 0.78 / height,
        )
        for ax, batch in zip(axes, batches, strict=True):
            _draw(ax, df[df["batch"] == batch], looks)
            ax.set_title(f"batch {batch}", color=INK)
        axes[0].set_ylabel("Throughput (tokens/s)")
        handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        anchor = (1 - 2.15 / width, 1 - 0.78 / height)
        fig.legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=anchor, frameon=False)
        dress(fig, [(f"Measured here: {one['model']}, throughput against KV budget", "#20344A", "white")], lines)
    return fig


def _draw(ax, here: pd.DataFrame, looks: dict) -> None:
    evicting = here[here["kv_budget"].notna()]
    roof = evicting.groupby("kv_budget")["roof"].mean()
    ax.plot(roof.index, roof, color=INK, linewidth=2.2, linestyle=(0, (6, 2)), label="roofline", gid="roofline")
    alone = here["linears"].dropna()
    if len(alone):
        ax.axhline(alone.mean(), color=GREY, linewidth=1.3, label="HF's linear layers")
    for arm, (label, color, dashes) in LEVELS.items():
        for level in here.loc[here["arm"] == arm, "tokens_per_s"]:
            ax.axhline(level, color=color, linewidth=1.5, linestyle=dashes, label=label)
    budgets = sorted(evicting["kv_budget"].unique())
    # Side by side where several share a budget: they differ by less than their markers' size.
    step = 0.03 * (budgets[-1] - budgets[0] or budgets[0])
    at = evicting.groupby("kv_budget")["policy"].agg(list)
    for name, rows in evicting.groupby("policy", sort=False):
        rows = rows.sort_values("kv_budget")
        x = [b + step * (at[b].index(name) - (len(at[b]) - 1) / 2) for b in rows["kv_budget"]]
        y = rows["tokens_per_s"]
        ax.errorbar(
            x,
            y,
            [y - rows["low"], rows["high"] - y],
            label=arm_title(name),
            markersize=6.5,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=2.5,
            **looks[name],
        )
    ax.set_xticks(budgets, [f"{budget:.0f}" for budget in budgets])
    if len(budgets) == 1:
        ax.set_xlim(budgets[0] * 0.5, budgets[0] * 1.5)
    ax.set(xlabel="KV budget (slots)", ylim=(0, None))
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines["right"].set_visible(False)


def throughput_table(df: pd.DataFrame) -> pd.DataFrame:
    """The numbers of throughput_figure as text, one row per arm, by batch and KV budget; those that keep all last."""
    df = df.sort_values(["batch", "kv_budget", "tokens_per_s"], ascending=[True, True, False], kind="stable")
    return pd.DataFrame(
        {
            "Batch": df["batch"].map(str),
            "KV budget": df["kv_budget"].map(lambda value: "none" if pd.isna(value) else f"{value:.0f}"),
            "Arm": df["policy"].map(arm_title),
            "Tokens/s (slowest to fastest round)": [
                f"{row.tokens_per_s:,.1f} ({row.low:,.1f} to {row.high:,.1f})" for row in df.itertuples()
            ],
            "Mean live slots": df["live_slots"].map("{:.0f}".format),
            "Roofline (tokens/s)": df["roof"].map("{:,.1f}".format),
            "Of the roofline": (df["tokens_per_s"] / df["roof"]).map("{:.0%}".format),
            "Of the linear layers": (df["tokens_per_s"] / df["linears"]).map(
                lambda value: "not measured" if pd.isna(value) else f"{value:.0%}"
            ),
        }
    ).reset_index(drop=True)
