"""DataFrame -> matplotlib Figure: the published chart, the measured chart, their tables.

Knows columns and colours. It does not know where records lie, how an answer is graded
or how an interval is computed, and it never imports torch or pyplot.
"""

import io
import itertools
import math
import textwrap
from pathlib import Path

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kvlib.files import write_atomically

BLUE = "#0072B2"
ORANGE = "#D55E00"
ORANGE_TEXT = "#B84A00"  # the line's orange is too pale for text
INK = "#222222"
GREY = "#8A8A8A"

STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so every machine draws the same glyphs
    "font.size": 10,
    "axes.titlesize": 12.5,
    "axes.labelsize": 11.5,
    "axes.spines.top": False,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10,
    "hatch.linewidth": 0.8,
    "svg.hashsalt": "kvlib",
}

PUBLISHED_COLUMNS = ["model", "dataset", "kv_budget", "pass_at_1", "throughput_tps"]
PUBLISHED_PASS_RANGE = {"AIME24": (20, 60), "AIME25": (10, 50), "AMC23": (60, 100), "GPQA-D": (30, 70)}
PUBLISHED_THROUGHPUT_RANGE = (600, 800)

MEASURED_NUMBERS = ["pass_at_1", "pass_low", "pass_high", "throughput", "throughput_low", "throughput_high"]
MEASURED_COLUMNS = [
    "model", "dataset", "policy", "kv_budget", *MEASURED_NUMBERS,
    "n_problems", "n_samples", "throughput_definition", "batch_size", "device",
]  # fmt: skip
ONE_VALUE_PER_CHART = ["model", "policy", "n_samples", "throughput_definition", "batch_size", "device"]

TINY_CAVEAT = "A tiny model on made-up problems: demonstrates the mechanism, says nothing about R1-Qwen."

TOP = 116  # percent: leaves room above 100 for the legend
BAR_WIDTH = 0.82  # in steps between budgets


class IncompleteError(ValueError):
    """Cells that the grid asks for have no row; the message names them and the next step."""


def load_published(path):
    """Read a digitised figure: model, dataset, kv_budget (slots), pass_at_1 (percent), throughput_tps.

    throughput_tps (tokens/s) is NaN where the figure could not be read.
    Raises FileNotFoundError if there is no such file, ValueError naming the fault if it is damaged.
    """
    path = Path(path)
    restore = f"restore it with `git checkout -- {path}`"
    if not path.is_file():
        raise FileNotFoundError(f"no published numbers at {path}; {restore}")
    try:
        df = pd.read_csv(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV ({error}); {restore}") from error
    missing = [name for name in PUBLISHED_COLUMNS if name not in df]
    if missing or df.empty:
        raise ValueError(f"{path} lacks {'column ' + ', '.join(missing) if missing else 'rows'}; {restore}")
    df = df[PUBLISHED_COLUMNS]
    for name in ["kv_budget", "pass_at_1", "throughput_tps"]:
        try:
            df = df.assign(**{name: pd.to_numeric(df[name])})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {name} holds something other than numbers ({error}); {restore}") from error
    if df.drop(columns="throughput_tps").isna().any(axis=None):
        raise ValueError(f"{path} has an empty field outside throughput_tps; {restore}")
    if (df["kv_budget"] % 1 != 0).any() or (df["kv_budget"] <= 0).any():
        raise ValueError(f"{path}: kv_budget must be a positive whole number; {restore}")
    if not df["pass_at_1"].between(0, 100).all():
        raise ValueError(f"{path}: pass_at_1 must lie between 0 and 100 percent; {restore}")
    df = df.astype({"kv_budget": int, "pass_at_1": float, "throughput_tps": float})
    # A file cut short or pasted twice still parses; the rectangle of cells gives it away.
    cells = df.groupby(["model", "dataset", "kv_budget"]).size()
    if len(df) != df["model"].nunique() * df["dataset"].nunique() * df["kv_budget"].nunique() or cells.max() > 1:
        raise ValueError(f"{path} does not hold each dataset at each KV budget exactly once; {restore}")
    return df


def published_figure(df):
    """The published panel, axes and labels as in the paper, marked as not measured here.

    df: as load_published returns it, for one model, datasets AIME24, AIME25, AMC23, GPQA-D.
    Raises ValueError for a dataset without a published axis range, a missing value, or a value
    outside its axis (it would be cut off).
    """
    if df["model"].nunique() != 1:
        raise ValueError(f"one model per chart, got {', '.join(df['model'].unique()) or 'none'}")
    model = df["model"].iloc[0]
    for row in df.itertuples():
        if row.dataset not in PUBLISHED_PASS_RANGE:
            raise ValueError(f"no published axis range for {row.dataset}; known: {', '.join(PUBLISHED_PASS_RANGE)}")
        for name, (low, high) in [
            ("pass_at_1", PUBLISHED_PASS_RANGE[row.dataset]),
            ("throughput_tps", PUBLISHED_THROUGHPUT_RANGE),
        ]:
            if not low <= getattr(row, name) <= high:  # NaN fails too
                cell = f"{row.model}, {row.dataset}, KV budget {row.kv_budget}"
                raise ValueError(f"{name} of {cell} is {getattr(row, name)}, not within the axis {low} to {high}")

    notes = [
        "Published data. Pass@1 as printed on the bars; throughput read off the line, about ±30. "
        "Axes as published: they do not start at 0.",
    ]
    with style():
        datasets = list(df["dataset"].unique())
        fig, axes = _canvas(
            len(datasets),
            f"Published (DynTS, arXiv 2601.18383), not measured here: {model}",
            "#E4E4E4",
            INK,
            notes,
            gap=1.38,
        )
        for ax, dataset in zip(axes, datasets, strict=True):
            rows = df[df["dataset"] == dataset].sort_values("kv_budget")
            budgets = rows["kv_budget"].tolist()
            step = budgets[1] - budgets[0] if len(budgets) > 1 else 1
            low, high = PUBLISHED_PASS_RANGE[dataset]
            right = _two_axes(ax, f"{model} | {dataset}", "Pass@1", "Throughput (TPS)")
            bars = ax.bar(budgets, rows["pass_at_1"], BAR_WIDTH * step, color=BLUE, label="Pass@1")
            for x, value in zip(budgets, rows["pass_at_1"], strict=True):
                _print_value(ax, x, low, value, "white")
            (line,) = _draw_line(right, budgets, rows["throughput_tps"], "Throughput")
            ax.set_xticks(budgets)
            ax.set_xlim(budgets[0] - 0.6 * step, budgets[-1] + 0.6 * step)
            ax.set_ylim(low, high)
            ax.set_yticks(range(low, high + 1, 10))
            right.set_ylim(*PUBLISHED_THROUGHPUT_RANGE)
            right.set_yticks(range(600, 801, 50))
        right.legend(handles=[bars, line], loc="upper right", framealpha=1)
    return fig


def measured_figure(
    df,
    expected,
    *,
    allow_incomplete=False,
    caveat=TINY_CAVEAT,
    throughput_interval="lowest to highest repeat",
):
    """The same form as the published panel, for values measured here; both axes start at 0.

    df: one row per (dataset, kv_budget), of one model and policy, with the columns
        model, dataset, policy, device            str
        kv_budget                                 slots; NaN or None = full cache
        pass_at_1, pass_low, pass_high            percent; the 95 % interval
        n_problems, n_samples                     problems; samples per problem
        throughput, throughput_low, _high         tokens/s; median and interval
        throughput_definition                     str, the right axis label
        batch_size                                rows decoded together in the timing run
    expected: list of (dataset, kv_budget) that the chart promises; None as budget = full cache.
        Its order is the order of the panels.
    allow_incomplete: draw missing cells as hatched columns under a visible mark instead of raising.
    caveat: the sentence under the chart; the default is only true of the tiny study.
    throughput_interval: what throughput_low and throughput_high are, for the note.

    Raises IncompleteError naming the missing cells; ValueError for a missing column, a NaN or
    impossible value (naming its cell), a cell that is there twice or not expected, or rows of
    different models, policies, devices, definitions or sample counts.
    """
    expected = list(dict.fromkeys((dataset, _budget(budget)) for dataset, budget in expected))
    if all(budget is None for _, budget in expected):
        raise ValueError("expected names no KV budget, so there is nothing to put on the x axis")
    rows = _measured_rows(df)
    unexpected = [cell for cell in rows if cell not in expected]
    if unexpected:
        raise ValueError(f"not part of this grid: {_name_cells(unexpected)}; pass only the rows to be drawn")
    missing = [cell for cell in expected if cell not in rows]
    count = f"{len(missing)} of {len(expected)} cells missing"
    if missing and not (allow_incomplete and rows):
        raise IncompleteError(f"{count}: {_name_cells(missing)}; run `make charts` again")

    one = next(iter(rows.values()))
    interval = "Wilson" if one.n_samples == 1 else "bootstrap over problems"
    samples = f"{one.n_samples} sample{'s' if one.n_samples > 1 else ''} per problem"
    notes = [
        f"Measured on {one.device}. Policy {one.policy}, {samples}, n = problems; "
        f"whiskers: 95 % interval ({interval}). "
        f"Throughput at batch size {one.batch_size}: median; band: {throughput_interval}.",
        *([caveat] if caveat else []),
    ]
    datasets = list(dict.fromkeys(dataset for dataset, _ in expected))
    budgets = sorted({budget for _, budget in expected if budget is not None})
    # Uneven budgets become equal steps: to scale, their bars would overlap or thin to nothing.
    even = len({b - a for a, b in itertools.pairwise(budgets)}) <= 1
    places = budgets if even else list(range(len(budgets)))
    step = places[1] - places[0] if len(places) > 1 else 1
    fastest = max((row.throughput_high for (_, budget), row in rows.items() if budget is not None), default=1)
    tick = _round_up(fastest / 5)
    right_label = textwrap.wrap(one.throughput_definition, 30, break_on_hyphens=False)

    with style():
        fig, axes = _canvas(
            len(datasets),
            f"Measured here: {one.model}, policy {one.policy}",
            "#20344A",
            "white",
            notes,
            gap=1.02,
            right=0.62 + 0.2 * len(right_label),
            mark=f"INCOMPLETE: {count}" if missing else None,
        )
        for index, (ax, dataset) in enumerate(zip(axes, datasets, strict=True)):
            here = {budget: row for (name, budget), row in rows.items() if name == dataset}
            n = f"n = {next(iter(here.values())).n_problems}" if here else "missing"
            right = _two_axes(
                ax,
                f"{one.model} | {dataset} ({n})",
                "Pass@1 (%)" if index == 0 else "",
                "\n".join(right_label) if index == len(datasets) - 1 else "",
            )
            ax.set_xticks(places, budgets)
            ax.set_xlabel("KV Budget" if even else "KV Budget (not to scale)")
            wants_full = (dataset, None) in expected
            end = places[-1] + (1.62 if wants_full else 0.6) * step
            ax.set_xlim(places[0] - 0.6 * step, end)
            ax.set_ylim(0, TOP)
            ax.set_yticks(range(0, 101, 20))
            right.set_ylim(0, 5 * tick * TOP / 100)
            right.set_yticks([tick * i for i in range(6)])
            ax.grid(axis="y", color="#DDDDDD", linewidth=0.7)
            ax.set_axisbelow(True)

            drawn = [(x, here[b]) for x, b in zip(places, budgets, strict=True) if b in here]
            bars = ax.bar(
                [x for x, _ in drawn],
                [row.pass_at_1 for _, row in drawn],
                BAR_WIDTH * step,
                color=BLUE,
                label="Pass@1 (left)",
            )
            for x, row in drawn:
                _draw_whisker(ax, x, row, step)
            for x, budget in zip(places, budgets, strict=True):
                if (dataset, budget) in missing:
                    _draw_missing(ax, x, step)
            line = _draw_throughput(right, places, [here.get(b) for b in budgets])
            if wants_full:
                _draw_full_cache(ax, here.get(None), (places[-1] + 0.45 * step + end) / 2, step)
        right.legend(
            handles=[bars, line],
            loc="upper right",
            ncols=2,
            frameon=False,
            borderaxespad=0,
            columnspacing=0.7,
            handlelength=1.4,
            handletextpad=0.4,
            fontsize=9.2,
        )
    return fig


def published_table(df):
    """The numbers of published_figure as text, one row per cell, for beneath the chart.

    df: as load_published returns it. A throughput that could not be read says so.
    """
    read = df["throughput_tps"].map(lambda value: "not readable" if pd.isna(value) else f"{value:.0f}")
    return pd.DataFrame(
        {
            "Model": df["model"],
            "Dataset": df["dataset"],
            "KV budget": df["kv_budget"].map(str),
            "Pass@1 (%)": df["pass_at_1"].map("{:.1f}".format),
            "Throughput (tokens/s, read off the line, about ±30)": read,
        }
    ).reset_index(drop=True)


def measured_table(df):
    """The numbers of measured_figure as text, one row per cell, full cache last in each dataset.

    df: the columns of measured_figure; if present also mean_tokens (tokens per answer) and
    truncated_share (fraction from 0 to 1 of answers cut at the length limit).
    Raises ValueError as measured_figure does.
    """
    rows = _measured_rows(df)
    datasets = list(dict.fromkeys(dataset for dataset, _ in rows))
    cells = sorted(rows, key=lambda cell: (datasets.index(cell[0]), cell[1] is None, cell[1] or 0))
    table = []
    for dataset, budget in cells:
        row = rows[dataset, budget]
        line = {
            "Dataset": dataset,
            "KV budget": "full cache" if budget is None else str(budget),
            "n": str(row.n_problems),
            "Pass@1 (%) with 95 % interval": (f"{row.pass_at_1:.1f} ({row.pass_low:.1f} to {row.pass_high:.1f})"),
            row.throughput_definition: (
                f"{row.throughput:,.0f} ({row.throughput_low:,.0f} to {row.throughput_high:,.0f})"
            ),
        }
        if hasattr(row, "mean_tokens"):
            line["Mean output (tokens)"] = f"{row.mean_tokens:.0f}"
        if hasattr(row, "truncated_share"):
            line["Truncated (%)"] = f"{100 * row.truncated_share:.1f}"
        table.append(line)
    return pd.DataFrame(table)


def save(fig, stem):
    """Write fig as <stem>.png (200 dpi) and <stem>.svg; return the two paths.

    The same figure gives the same bytes. A file is replaced whole or not at all.
    Raises OSError naming the folder if it cannot be written.
    """
    stem = Path(stem)
    pictures = []
    with style():
        for suffix, metadata in [(".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})]:
            buffer = io.BytesIO()
            fig.savefig(buffer, format=suffix[1:], dpi=200, metadata=metadata)
            pictures.append((stem.with_name(stem.name + suffix), buffer.getvalue()))
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path, data in pictures:
            write_atomically(path, data)
    except OSError as error:
        raise type(error)(f"cannot write charts to {stem.parent} ({error}); make that folder writable") from error
    return [path for path, _ in pictures]


def style():
    """The context in which every chart is drawn."""
    # From matplotlib's defaults, so that a user's matplotlibrc cannot change a chart.
    return matplotlib.style.context(["default", STYLE])


def _budget(value):
    return None if pd.isna(value) else int(value)


def _name_cell(dataset, budget):
    return f"{dataset} at {'full cache' if budget is None else f'KV budget {budget}'}"


def _name_cells(cells, most=8):
    names = [_name_cell(*cell) for cell in cells]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _measured_rows(df):
    """{(dataset, budget or None): row}, checked so that whatever is drawn can be trusted."""
    if df.empty:
        return {}
    absent = [name for name in MEASURED_COLUMNS if name not in df]
    if absent:
        raise ValueError(f"measured records lack column {', '.join(absent)}")
    for name in ONE_VALUE_PER_CHART:
        if df[name].nunique(dropna=False) > 1:
            values = ", ".join(map(str, df[name].unique()))
            raise ValueError(f"one {name} per chart, got {values}; pass only the rows to be drawn")
    for dataset, group in df.groupby("dataset"):
        if group["n_problems"].nunique(dropna=False) > 1:
            raise ValueError(f"{dataset} has cells of different n_problems; its bars cannot be compared")

    numbers = [name for name in [*MEASURED_NUMBERS, "mean_tokens", "truncated_share"] if name in df]
    rows = {}
    for row in df.itertuples(index=False):
        cell = (row.dataset, _budget(row.kv_budget))
        if cell in rows:
            raise ValueError(f"{_name_cell(*cell)} is there twice; pass one row per cell")
        for name in numbers:
            value = getattr(row, name)
            if pd.isna(value) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} of {_name_cell(*cell)} is {value}; every value drawn must be measured")
        # A rounding error of the interval's formula is not a fault.
        for name, low, high in [
            ("pass_at_1", "pass_low", "pass_high"),
            ("throughput", *MEASURED_NUMBERS[4:]),
        ]:
            if not getattr(row, low) - 1e-6 <= getattr(row, name) <= getattr(row, high) + 1e-6:
                raise ValueError(f"{name} of {_name_cell(*cell)} lies outside its interval {low} to {high}")
        if row.pass_high > 100 + 1e-6 or getattr(row, "truncated_share", 0) > 1:
            raise ValueError(f"{_name_cell(*cell)}: pass_high is above 100 percent or truncated_share above 1")
        rows[cell] = row
    return rows


def _canvas(n_panels, heading, band, ink, notes, gap, right=0.82, mark=None):
    """A row of n_panels axes under a heading band and over wrapped notes; sizes in inches."""
    left = 0.72
    between = left + right + gap * (n_panels - 1)
    width = max(8.0, 2.85 * n_panels + between)
    lines = [line for note in notes for line in textwrap.wrap(note, int(width * 12.6))]
    strips = [(heading, band, ink)] + ([(mark, "#FFD84D", "black")] if mark else [])
    top, bottom = 0.34 * len(strips) + 0.42, 0.68 + 0.21 * len(lines)
    height = top + 2.75 + bottom
    fig = Figure(figsize=(width, height), dpi=100, facecolor="white")
    axes = fig.subplots(1, n_panels, squeeze=False)[0]
    panel = (width - between) / n_panels
    fig.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        wspace=gap / panel,
        bottom=bottom / height,
        top=1 - top / height,
    )
    dress(fig, strips, lines)
    return fig, axes


def dress(fig, strips, lines):
    """Heading bands (text, face, ink), 0.34 inches high each, on top of fig, and lines of notes at its foot."""
    width, height = fig.get_size_inches()
    for i, (text, face, color) in enumerate(strips):
        y = 1 - 0.34 * (i + 1) / height
        fig.add_artist(Rectangle((0, y), 1, 0.34 / height, transform=fig.transFigure, color=face, linewidth=0))
        fig.text(0.15 / width, y + 0.17 / height, text, color=color, weight="bold", size=11.5, va="center_baseline")
    fig.text(0.15 / width, 0.1 / height, "\n".join(lines), color=INK, size=10.5, va="bottom", linespacing=1.35)


def _two_axes(ax, title, left_label, right_label):
    right = ax.twinx()
    ax.set_title(title, color=INK)
    ax.set_xlabel("KV Budget")
    ax.set_ylabel(left_label, color=BLUE)
    ax.tick_params(axis="y", labelcolor=BLUE)
    right.set_ylabel(right_label, color=ORANGE_TEXT)
    right.tick_params(axis="y", labelcolor=ORANGE_TEXT)
    return right


def _draw_line(right, x, y, label):
    return right.plot(
        x, y, color=ORANGE, linewidth=2.2, marker="o", markersize=7.5, markeredgecolor="white", label=label
    )


def _draw_throughput(right, x, rows):
    nan = float("nan")  # a gap in the line where a cell is missing
    low = [row.throughput_low if row else nan for row in rows]
    high = [row.throughput_high if row else nan for row in rows]
    right.fill_between(x, low, high, color=ORANGE, alpha=0.35, linewidth=0)
    (line,) = _draw_line(right, x, [row.throughput if row else nan for row in rows], "Throughput (right)")
    return line


def _print_value(ax, x, base, value, color):
    # At the foot of the bar, where neither the line nor a whisker passes.
    text = "100" if value == 100 else f"{value:.1f}"
    ax.annotate(text, (x, base), (0, 3), textcoords="offset points", ha="center", va="bottom", color=color, size=9)


def _draw_whisker(ax, x, row, step):
    # Left of the bar's middle, where the line's marker cannot hide it.
    below, above = max(0, row.pass_at_1 - row.pass_low), max(0, row.pass_high - row.pass_at_1)
    ax.errorbar(
        x - 0.24 * step,
        row.pass_at_1,
        [[below], [above]],
        color=INK,
        linewidth=1.3,
        capsize=2.5,
        clip_on=False,
    )
    if min(row.pass_low, row.pass_at_1) > 9:
        _print_value(ax, x, 0, row.pass_at_1, "white")
    else:
        _print_value(ax, x, row.pass_high, row.pass_at_1, INK)


def _draw_missing(ax, x, step, text="missing"):
    half = BAR_WIDTH * step / 2
    ax.axvspan(x - half, x + half, facecolor="#F6F6F6", edgecolor=GREY, hatch="////", linewidth=0, gid="missing")
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    ax.text(x, 50, text, rotation=90, ha="center", va="center", size=9.5, color=INK, bbox=paper)


def _draw_full_cache(ax, row, x, step):
    """Dashed level across the panel, named in the free slot right of the last bar."""
    if row is None:
        _draw_missing(ax, x, step, "full cache missing")
        return
    level = row.pass_at_1
    ax.axhline(level, color=INK, linewidth=1.3, linestyle=(0, (4, 2.5)), label="full cache")
    value = "100" if level == 100 else f"{level:.1f}"
    away, side = (3, "bottom") if level < 70 else (-3, "top")
    ax.annotate(
        f"full\ncache\n{value}",
        (x, level),
        (0, away),
        textcoords="offset points",
        ha="center",
        va=side,
        size=9,
    )


def _round_up(value):
    """The next number that makes readable ticks."""
    if value <= 0:
        return 1
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * m for m in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * m >= value * (1 - 1e-9))
