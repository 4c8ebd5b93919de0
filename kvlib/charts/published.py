"""The published KV-budget figures, redrawn from their numbers and marked as not measured here; their bars and line."""

import pandas as pd

from kvlib.charts.rows import alike, texts
from kvlib.charts.sheet import BLUE, INK, ORANGE, ORANGE_TEXT, PALE, sheet, style
from kvlib.errors import ConfigError

COLUMNS = ["model", "dataset", "kv_budget", "pass_at_1", "throughput_tps"]
PASS_RANGE = {"AIME24": (20, 60), "AIME25": (10, 50), "AMC23": (60, 100), "GPQA-D": (30, 70), "Mean": (30, 70)}
THROUGHPUT_RANGE = {"R1-Qwen": (600, 800), "R1-Llama": (400, 600)}
MEAN = "Mean"
"""The dataset that is the mean of the others; it has no panel, and its line is drawn where the others have none."""
BAR_WIDTH = 0.82  # in steps between budgets
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def load_published(path):
    """Read a digitised figure: model, dataset, kv_budget (slots), pass_at_1 (percent), throughput_tps.

    throughput_tps (tokens/s) is NaN where the figure could not be read.
    Raises ConfigError naming the fault if the file is missing or damaged.
    """
    numbers = {"kv_budget": int, "pass_at_1": float, "throughput_tps": float}
    try:
        df = pd.read_csv(path, usecols=COLUMNS, dtype=numbers)[COLUMNS]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it with `git checkout -- {path}`") from error
    key = ["model", "dataset", "kv_budget"]
    faults = {
        "has no rows": df.empty,
        "has an empty field outside throughput_tps": df.drop(columns="throughput_tps").isna().any(axis=None),
        "has a kv_budget that is not positive": (df["kv_budget"] <= 0).any(),
        "has a pass_at_1 that is not between 0 and 100 percent": not df["pass_at_1"].between(0, 100).all(),
        # A file cut short or pasted twice still parses; the rectangle of cells gives it away.
        "does not hold each dataset at each KV budget exactly once":
            df.duplicated(key).any() or len(df) != df[key].nunique().prod(),
    }  # fmt: skip
    for fault in (fault for fault, found in faults.items() if found):
        raise ConfigError(f"{path} {fault}; restore it with `git checkout -- {path}`")
    return df


def published_figure(df):
    """The published panel, axes and labels as in the paper, marked as not measured here.

    df: as load_published returns it, for R1-Qwen or R1-Llama; datasets AIME24, AIME25, AMC23, GPQA-D and Mean, the
        mean of the four. Where only the mean's throughput is known, its line is drawn once, in the last panel.
    Raises ConfigError for a model or dataset without a published axis range, a missing value beside ones that are
    there, or a value outside its axis (it would be cut off).
    """
    alike(df, ["model"])
    model = df["model"].iloc[0]
    if model not in THROUGHPUT_RANGE:
        raise ConfigError(f"no published axis range for {model}; known: {', '.join(THROUGHPUT_RANGE)}")
    fastest = THROUGHPUT_RANGE[model]
    unread = [name for name, rows in df.groupby("dataset") if rows["throughput_tps"].isna().all()]
    for row in df.itertuples():
        if row.dataset not in PASS_RANGE:
            raise ConfigError(f"no published axis range for {row.dataset}; known: {', '.join(PASS_RANGE)}")
        for name, (low, high) in [("pass_at_1", PASS_RANGE[row.dataset]), ("throughput_tps", fastest)]:
            value = getattr(row, name)
            if not low <= value <= high and not (name == "throughput_tps" and row.dataset in unread):  # NaN fails too
                cell = f"{row.model}, {row.dataset}, KV budget {row.kv_budget}"
                raise ConfigError(f"{name} of {cell} is {value}, not within the axis {low} to {high}")
    datasets = [name for name in df["dataset"].unique() if name != MEAN]
    lines = {name: name for name in datasets if name not in unread}
    if unread and MEAN in set(df["dataset"]):
        lines[datasets[-1]] = MEAN
    axes_are = "as published" if model == "R1-Qwen" else "like those of R1-Qwen"
    notes = ["Published data. Pass@1 as printed on the bars; throughput read off the line, about ±30. "
             f"Axes {axes_are}: they do not start at 0."]  # fmt: skip
    if unread:
        notes.append("Throughput is known as the mean over the four datasets only; its line is drawn once.")
    with style():
        heading = f"Published (DynTS, arXiv 2601.18383), not measured here: {model} on {', '.join(datasets)}"
        fig, axes = sheet(heading, notes, len(datasets), (2.85, 2.6), (0.72, 0.62, 0.42, 0.6), 4, 0.2, band=PALE)
        for ax, dataset in zip(axes, datasets, strict=True):
            rows = df[df["dataset"] == dataset].sort_values("kv_budget")
            budgets = rows["kv_budget"].tolist()
            step = budgets[1] - budgets[0] if len(budgets) > 1 else 1
            low, high = PASS_RANGE[dataset]
            source = lines.get(dataset)
            label = "Throughput (TPS)" if source == dataset else "Throughput (TPS), mean of the four" if source else ""
            right = two_axes(ax, f"{model} | {dataset}", "Pass@1", label)
            bars = ax.bar(budgets, rows["pass_at_1"], BAR_WIDTH * step, color=BLUE, label="Pass@1")
            for x, value in zip(budgets, rows["pass_at_1"], strict=True):
                print_value(ax, x, low, value, "white")
            if source:
                speeds = df[df["dataset"] == source].sort_values("kv_budget")["throughput_tps"]
                line = draw_line(right, budgets, speeds, "Throughput")
            ax.set_xticks(budgets)
            ax.set_xlim(budgets[0] - 0.6 * step, budgets[-1] + 0.6 * step)
            ax.set_ylim(low, high)
            ax.set_yticks(range(low, high + 1, 10))
            right.set_ylim(*fastest)
            right.set_yticks(range(fastest[0], fastest[1] + 1, 50) if source else [])
            for side in (ax, right):
                side.spines["right"].set_visible(bool(source))
        right.legend(handles=[bars, line] if source else [bars], loc="upper right", framealpha=1)
    return fig


def published_table(df):
    """The numbers of published_figure as text, one row per cell, for beneath the chart.

    df: as load_published returns it. A throughput that could not be read says so.
    """
    return pd.DataFrame(
        {
            "Model": df["model"].tolist(),
            "Dataset": df["dataset"].tolist(),
            "KV budget": texts(df["kv_budget"]),
            "Pass@1 (%)": texts(df["pass_at_1"], "{:.1f}"),
            "Throughput (tokens/s, read off the line, about ±30)": texts(df["throughput_tps"], missing="not readable"),
        }
    )


def two_axes(ax, title, left_label, right_label):
    """The right axis of ax, for throughput; titles and colours of both."""
    right = ax.twinx()
    ax.set_title(title, color=INK)
    ax.set_xlabel("KV Budget")
    ax.set_ylabel(left_label, color=BLUE)
    ax.tick_params(axis="y", labelcolor=BLUE)
    right.set_ylabel(right_label, color=ORANGE_TEXT)
    right.tick_params(axis="y", labelcolor=ORANGE_TEXT)
    return right


def draw_line(right, x, y, label):
    (line,) = right.plot(
        x, y, color=ORANGE, linewidth=2.2, marker="o", markersize=7, markeredgecolor="white", label=label, gid="line"
    )
    return line


def print_value(ax, x, base, value, color, rotation=0):
    """A value at the foot of its bar, where neither the line nor a whisker passes."""
    text = "100" if value == 100 else f"{value:.1f}"
    ax.annotate(text, (x, base), (0, 3), textcoords="offset points", ha="center", va="bottom", color=color, size=9,
                rotation=rotation)  # fmt: skip


def draw_beside(ax, right, places, rows, aside, step):
    """The published values of the places that have one: (hatched bars, dashed line)."""
    there = [(x + aside, row.pass_at_1) for x, row in zip(places, rows, strict=True) if row]
    hatched = ax.bar([x for x, _ in there], [value for _, value in there], 0.4 * step, facecolor="white",
                     edgecolor=BLUE, hatch="////", label="published")  # fmt: skip
    for x, value in there:
        ax.text(
            x + 0.02 * step, 3, f"{value:.1f}", rotation=90, ha="center", va="bottom", size=9, color=INK, bbox=PAPER
        )
    speeds = [row.throughput_tps if row else float("nan") for row in rows]
    (dashed,) = right.plot(places, speeds, color=ORANGE, linewidth=1.6, linestyle=(0, (4, 2)), marker="o", markersize=5,
                           markerfacecolor="white", label="published")  # fmt: skip
    return hatched, dashed
