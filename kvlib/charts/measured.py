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
PUBLISHED_PASS_RANGE = {
    "AIME24": (20, 60),
    "AIME25": (10, 50),
    "AMC23": (60, 100),
    "GPQA-D": (30, 70),
    "Mean": (30, 70),
}
PUBLISHED_THROUGHPUT_RANGE = {"R1-Qwen": (600, 800), "R1-Llama": (400, 600)}

MEASURED_NUMBERS = ["pass_at_1", "pass_low", "pass_high", "throughput", "throughput_low", "throughput_high"]
MEASURED_COLUMNS = [
    "model", "dataset", "policy", "kv_budget", *MEASURED_NUMBERS,
    "n_problems", "n_samples", "throughput_definition", "batch_size", "device",
]  # fmt: skip
ONE_VALUE_PER_CHART = ["model", "policy", "n_samples", "throughput_definition", "batch_size", "device"]

TINY_CAVEAT = "A tiny model on made-up problems: demonstrates the mechanism, says nothing about R1-Qwen."

EXACT, PUBLISHED_RULES = "exact checker", "published rules"
BESIDE_NOTE = (
    "Published (DynTS, arXiv 2601.18383; hatched, dashed), not measured here: without interval, because its verdicts "
    "per problem are not published; its throughput counts forward time only, at batch size 20 on the authors' GPUs."
)

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

    df: as load_published returns it, for R1-Qwen or R1-Llama; datasets AIME24, AIME25, AMC23, GPQA-D and Mean, the
        mean of the four. A dataset without any throughput gets no line, and the note says which.
    Raises ValueError for a model or dataset without a published axis range, a missing value beside ones that are
    there, or a value outside its axis (it would be cut off).
    """
    if df["model"].nunique() != 1:
        raise ValueError(f"one model per chart, got {', '.join(df['model'].unique()) or 'none'}")
    model = df["model"].iloc[0]
    if model not in PUBLISHED_THROUGHPUT_RANGE:
        raise ValueError(f"no published axis range for {model}; known: {', '.join(PUBLISHED_THROUGHPUT_RANGE)}")
    fastest = PUBLISHED_THROUGHPUT_RANGE[model]
    datasets = list(df["dataset"].unique())
    unread = [name for name in datasets if df.loc[df["dataset"] == name, "throughput_tps"].isna().all()]
    for row in df.itertuples():
        if row.dataset not in PUBLISHED_PASS_RANGE:
            raise ValueError(f"no published axis range for {row.dataset}; known: {', '.join(PUBLISHED_PASS_RANGE)}")
        for name, (low, high) in [
            ("pass_at_1", PUBLISHED_PASS_RANGE[row.dataset]),
            *([] if row.dataset in unread else [("throughput_tps", fastest)]),
        ]:
            if not low <= getattr(row, name) <= high:  # NaN fails too
                cell = f"{row.model}, {row.dataset}, KV budget {row.kv_budget}"
                raise ValueError(f"{name} of {cell} is {getattr(row, name)}, not within the axis {low} to {high}")

    notes = [
        "Published data. Pass@1 as printed on the bars; throughput read off the line, about ±30. "
        f"Axes {'as published' if model == 'R1-Qwen' else 'like those of R1-Qwen'}: they do not start at 0.",
    ]
    if unread:
        notes.append(f"The throughput on {', '.join(unread)} could not be read, so no line is drawn there.")
    with style():
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
            read = dataset not in unread
            right = _two_axes(ax, f"{model} | {dataset}", "Pass@1", "Throughput (TPS)" if read else "")
            bars = ax.bar(budgets, rows["pass_at_1"], BAR_WIDTH * step, color=BLUE, label="Pass@1")
            for x, value in zip(budgets, rows["pass_at_1"], strict=True):
                _print_value(ax, x, low, value, "white")
            if read:
                (line,) = _draw_line(right, budgets, rows["throughput_tps"], "Throughput")
            ax.set_xticks(budgets)
            ax.set_xlim(budgets[0] - 0.6 * step, budgets[-1] + 0.6 * step)
            ax.set_ylim(low, high)
            ax.set_yticks(range(low, high + 1, 10))
            right.set_ylim(*fastest)
            right.set_yticks(range(fastest[0], fastest[1] + 1, 50) if read else [])
            for side in (ax, right):
                side.spines["right"].set_visible(read)
        right.legend(handles=[bars, line] if read else [bars], loc="upper right", framealpha=1)
    return fig


def measured_figure(
    df,
    expected,
    *,
    allow_incomplete=False,
    published=None,
    mark="",
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
        With a column grader, other than "exact checker", the note names it; with a column batch_halved (bool), the
        note and the table name the cells that ran out of memory and were decoded with half the rows.
    allow_incomplete: draw missing cells as hatched columns under a visible mark instead of raising.
    published: rows of load_published of the same model, drawn hatched beside the measured bars and as a dashed line.
    mark: what a reader must not overlook, in a yellow band, e.g. that the numbers are made up.
    caveat: the sentence under the chart; the default is only true of the tiny study.
    throughput_interval: what throughput_low and throughput_high are, for the note.

    Raises IncompleteError naming the missing cells; ValueError for a missing column, a NaN or
    impossible value (naming its cell), a cell that is there twice or not expected, rows of
    different models, policies, devices, definitions or sample counts, or published values of another model or
    beside verdicts that are not by the published rules.
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
    grader = getattr(one, "grader", EXACT)
    beside = {} if published is None else _published_rows(published, one.model, grader)
    interval = "Wilson" if one.n_samples == 1 else "bootstrap over problems"
    samples = f"{one.n_samples} sample{'s' if one.n_samples > 1 else ''} per problem"
    notes = [
        f"Measured on {one.device}. Policy {one.policy}, {samples}, n = problems; "
        f"whiskers: 95 % interval ({interval}). "
        f"Throughput at batch size {one.batch_size}: median; band: {throughput_interval}.",
        *([] if grader == EXACT else [f"Graded by the {grader}."]),
        *([BESIDE_NOTE] if beside else []),
        *_halved_note(rows),
        *([caveat] if caveat else []),
    ]
    datasets = list(dict.fromkeys(dataset for dataset, _ in expected))
    budgets = sorted({budget for _, budget in expected if budget is not None})
    # Uneven budgets become equal steps: to scale, their bars would overlap or thin to nothing.
    even = len({b - a for a, b in itertools.pairwise(budgets)}) <= 1
    places = budgets if even else list(range(len(budgets)))
    step = places[1] - places[0] if len(places) > 1 else 1
    speeds = [row.throughput_high for (_, budget), row in rows.items() if budget is not None]
    speeds += [row.throughput_tps for row in beside.values() if row.throughput_tps > 0]
    fastest = max(speeds, default=1)
    tick = _round_up(fastest / 5)
    right_label = textwrap.wrap(one.throughput_definition, 30, break_on_hyphens=False)

    with style():
        fig, axes = _canvas(
            len(datasets),
            f"Measured here: {one.model}, policy {one.policy}" + (", beside the published values" if beside else ""),
            "#20344A",
            "white",
            notes,
            gap=1.02,
            right=0.62 + 0.2 * len(right_label),
            marks=[*([mark] if mark else []), *([f"INCOMPLETE: {count}"] if missing else [])],
            panel=4.2 if beside else 2.85,
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
            aside = 0.21 * step if beside else 0  # each of the two bars, from the middle
            bar_width = 0.4 * step if beside else BAR_WIDTH * step
            bars = ax.bar(
                [x - aside for x, _ in drawn],
                [row.pass_at_1 for _, row in drawn],
                bar_width,
                color=BLUE,
                label="Pass@1 (left)",
            )
            for x, row in drawn:
                if beside:
                    _draw_whisker(ax, x - (0.31 if row.pass_at_1 else 0.2) * step, row)
                    _print_value(ax, x - 0.2 * step, 0, row.pass_at_1, "white", rotation=90)
                else:
                    _draw_whisker(ax, x - (0.24 if row.pass_at_1 else 0) * step, row)
                    _print_pass(ax, x, row)
            if beside:
                theirs = [beside.get((dataset, b)) for b in budgets]
                hatched, dashed = _draw_published(ax, right, places, theirs, aside, step)
            for x, budget in zip(places, budgets, strict=True):
                if (dataset, budget) in missing:
                    _draw_missing(ax, x - aside, bar_width)
            line = _draw_throughput(right, places, [here.get(b) for b in budgets])
            if wants_full:
                _draw_full_cache(ax, here.get(None), (places[-1] + 0.45 * step + end) / 2, step)
        right.legend(
            handles=[bars, hatched, line, dashed] if beside else [bars, line],
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


def pairs_figure(pairs, model, *, mark="", caveat=TINY_CAVEAT):
    """Every two KV budgets of a dataset compared on the same problems and noise, one triangle per dataset.

    pairs: as kvlib.stats.budget_differences returns them. mark, caveat: as in measured_figure.
    Raises ValueError without pairs.
    """
    if pairs.empty:
        raise ValueError("no two KV budgets to compare; the grid needs at least two budgets, or one and the full cache")
    datasets = list(pairs["dataset"].unique())
    notes = [
        "Each square: Pass@1 at the row's KV budget minus that at the column's, in points, and the paired 95 % "
        "interval (bootstrap over problems). Bold on blue (more cache is better) or on orange (worse): the two differ "
        "by an exact sign-flip test over problems, 5 % for a dataset as a whole (Holm). Grey: these problems cannot "
        "tell them apart.",
        *([caveat] if caveat else []),
    ]
    columns = min(2, len(datasets))
    n_rows = -(-len(datasets) // columns)
    side = 0.78 * (max(pairs.groupby("dataset")["fewer"].nunique()))
    width = max(8.0, columns * (side + 1.5))
    lines = [line for note in notes for line in textwrap.wrap(note, int(width * 12.6))]
    strips = [(f"Measured here: {model}, KV budgets compared pairwise", "#20344A", "white")]
    strips += [(mark, "#FFD84D", "black")] if mark else []
    top, bottom = 0.34 * len(strips) + 0.5, 0.75 + 0.21 * len(lines)
    height = top + n_rows * side + (n_rows - 1) * 1.15 + bottom
    with style():
        fig = Figure(figsize=(width, height), dpi=100, facecolor="white")
        axes = fig.subplots(n_rows, columns, squeeze=False)
        fig.subplots_adjust(left=1.0 / width, right=1 - 0.2 / width, bottom=bottom / height, top=1 - top / height,
                            wspace=1.3 / side, hspace=1.15 / side)  # fmt: skip
        for ax, dataset in itertools.zip_longest(axes.flat, datasets):
            if dataset is None:
                ax.remove()
            else:
                _draw_triangle(ax, pairs[pairs["dataset"] == dataset], f"{model} | {dataset}")
        dress(fig, strips, lines)
    return fig


def _draw_triangle(ax, pairs, title):
    fewer, more = sorted(pairs["fewer"].unique()), sorted(pairs["more"].unique())
    for row in pairs.itertuples():
        x, y = fewer.index(row.fewer), more.index(row.more)
        face = "#F0F0F0" if not row.differs else BLUE if row.difference > 0 else ORANGE_TEXT
        ink, weight = ("white", "bold") if row.differs else (INK, "normal")
        ax.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=face, linewidth=0))
        ax.text(x, y - 0.13, _signed(row.difference, 1), ha="center", va="center", color=ink, size=10.5, weight=weight)
        interval = f"{_signed(row.low)} to {_signed(row.high)}"
        ax.text(x, y + 0.23, interval, ha="center", va="center", color=ink, size=7.8)
    n = pairs["n_problems"].iloc[0]
    ax.set_title(f"{title} (n = {n}): {pairs['differs'].sum()} of {len(pairs)} pairs differ", color=INK, fontsize=11.5)
    ax.set_xticks(range(len(fewer)), [_budget_name(b) for b in fewer])
    ax.set_yticks(range(len(more)), [_budget_name(b, "full") for b in more])
    ax.set(xlim=(-0.5, len(fewer) - 0.5), ylim=(len(more) - 0.5, -0.5), xlabel="minus KV budget", ylabel="KV budget")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def pairs_table(pairs):
    """The numbers of pairs_figure as text, one row per pair."""
    return pd.DataFrame(
        {
            "Dataset": pairs["dataset"],
            "KV budget": pairs["more"].map(_budget_name),
            "minus KV budget": pairs["fewer"].map(_budget_name),
            "n": pairs["n_problems"].map(str),
            "Difference (points) with 95 % interval": [
                f"{_signed(r.difference, 1)} ({_signed(r.low, 1)} to {_signed(r.high, 1)})" for r in pairs.itertuples()
            ],
            "Problems won": pairs["wins"].map(str),
            "Problems lost": pairs["losses"].map(str),
            "p": [f"{p:.4f}" if p >= 0.0001 else "< 0.0001" for p in pairs["p"]],
            "Differ (5 %, Holm)": pairs["differs"].map({True: "yes", False: "no"}),
        }
    ).reset_index(drop=True)


def _budget_name(budget, full="full cache"):
    return full if math.isinf(budget) else str(int(budget))


def _signed(value, digits=0):
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if float(text[1:]) == 0 else text


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

    df: the columns of measured_figure; if present also mean_tokens (tokens per answer),
    truncated_share (fraction from 0 to 1 of answers cut at the length limit), strict_pass_at_1 (percent) and
    unanswered_share (fraction without an answer), NaN where they do not apply.
    Raises ValueError as measured_figure does.
    """
    rows = _measured_rows(df)
    datasets = list(dict.fromkeys(dataset for dataset, _ in rows))
    cells = sorted(rows, key=lambda cell: (datasets.index(cell[0]), cell[1] is None, cell[1] or 0))
    table, halved = [], _halved(rows)
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
        if halved:
            line["Batch halved"] = "yes" if (dataset, budget) in halved else ""
        if hasattr(row, "strict_pass_at_1"):  # of a benchmark; a chain has an exact checker
            graded = not math.isnan(row.strict_pass_at_1)
            line["Strict Pass@1 (%)"] = f"{row.strict_pass_at_1:.1f}" if graded else ""
            line["Without an answer (%)"] = f"{100 * row.unanswered_share:.1f}" if graded else ""
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


def _halved(rows):
    """The cells whose batch was halved."""
    return [cell for cell, row in rows.items() if getattr(row, "batch_halved", False)]


def _halved_note(rows):
    if not _halved(rows):
        return []
    cells = _name_cells(_halved(rows))
    return [f"Ran out of GPU memory and were decoded with half the rows, whose sums round differently: {cells}."]


def _published_rows(published, model, grader):
    """{(dataset, budget): row} of published values that may stand beside what was measured."""
    if list(published["model"].unique()) != [model]:
        raise ValueError(f"published values of {', '.join(published['model'].unique())} do not belong beside {model}")
    if grader != PUBLISHED_RULES:
        raise ValueError(f"graded by the {grader}: only verdicts by the {PUBLISHED_RULES} belong beside published bars")
    return {(row.dataset, row.kv_budget): row for row in published.itertuples(index=False)}


def _canvas(n_panels, heading, band, ink, notes, gap, right=0.82, marks=(), panel=2.85):
    """A row of n_panels axes under a heading band and over wrapped notes; sizes in inches."""
    left = 0.72
    between = left + right + gap * (n_panels - 1)
    width = max(8.0, panel * n_panels + between)
    lines = [line for note in notes for line in textwrap.wrap(note, int(width * 12.6))]
    strips = [(heading, band, ink), *((mark, "#FFD84D", "black") for mark in marks)]
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


def _print_value(ax, x, base, value, color, rotation=0):
    # At the foot of the bar, where neither the line nor a whisker passes.
    text = "100" if value == 100 else f"{value:.1f}"
    ax.annotate(
        text,
        (x, base),
        (0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=color,
        size=9,
        rotation=rotation,
    )


def _draw_whisker(ax, x, row):
    # Left of the bar's middle, where the line's marker cannot hide it.
    below, above = max(0, row.pass_at_1 - row.pass_low), max(0, row.pass_high - row.pass_at_1)
    ax.errorbar(
        x,
        row.pass_at_1,
        [[below], [above]],
        color=INK,
        linewidth=1.3,
        capsize=2.5,
        clip_on=False,
    )


def _print_pass(ax, x, row):
    if min(row.pass_low, row.pass_at_1) > 9:
        _print_value(ax, x, 0, row.pass_at_1, "white")
    else:
        _print_value(ax, x, row.pass_high, row.pass_at_1, INK)


def _draw_published(ax, right, places, rows, aside, step):
    """The published values of the places that have one: (hatched bars, dashed line)."""
    there = [(x + aside, row.pass_at_1) for x, row in zip(places, rows, strict=True) if row]
    hatched = ax.bar(
        [x for x, _ in there],
        [value for _, value in there],
        0.4 * step,
        facecolor="white",
        edgecolor=BLUE,
        hatch="////",
        label="published",
    )
    for x, value in there:
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        ax.text(
            x + 0.02 * step, 3, f"{value:.1f}", rotation=90, ha="center", va="bottom", size=9, color=INK, bbox=paper
        )
    speeds = [row.throughput_tps if row else float("nan") for row in rows]
    (dashed,) = right.plot(
        places, speeds, color=ORANGE, linewidth=1.6, linestyle=(0, (4, 2)), marker="o", markersize=5,
        markerfacecolor="white", label="published",
    )  # fmt: skip
    return hatched, dashed


def _draw_missing(ax, x, bar_width, text="missing"):
    half = bar_width / 2
    ax.axvspan(x - half, x + half, facecolor="#F6F6F6", edgecolor=GREY, hatch="////", linewidth=0, gid="missing")
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    ax.text(x, 50, text, rotation=90, ha="center", va="center", size=9.5, color=INK, bbox=paper)


def _draw_full_cache(ax, row, x, step):
    """Dashed level across the panel, named in the free slot right of the last bar."""
    if row is None:
        _draw_missing(ax, x, BAR_WIDTH * step, "full cache missing")
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
