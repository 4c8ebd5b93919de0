"""DataFrame -> matplotlib Figure for many arms on the same problems, and the table that belongs beneath each.

An arm is a policy with its settings; the label of an arm whose prompt is protected ends in "+prompt". Like
kvlib.charts.measured: knows columns and colours, not how a value is measured, and never imports torch or pyplot.
"""

import itertools
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvlib.charts.measured import BLUE, GREY, INK, ORANGE, TINY_CAVEAT, dress, style
from kvlib.errors import ConfigError

CELL_COLUMNS = [
    "model", "dataset", "arm", "kv_budget", "protected", "n_problems", "n_samples", "pass_at_1", "pass_low",
    "pass_high", "mean_tokens", "truncated_share", "mean_live_slots", "kib_per_row", "seconds_per_solved",
    "round_us_per_row",
]  # fmt: skip
DIFFERENCE_COLUMNS = ["arm", "difference", "low", "high", "wins", "losses", "n_problems"]
FIDELITY_COLUMNS = ["arm", "kv_budget", "n_traces", "recall", "error"]
FACT_COLUMNS = ["arm", "kv_budget", "distance_low", "distance_high", "n", "right", "low", "high"]

FULL = "full cache"
PROMPT = "+prompt"
NULLS = ("random", "recency")
"""Arms that score nothing, by name without capitals: what a scorer has to beat."""

COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", (0, (6, 1.2)), (0, (3, 1, 1, 1)))
NULL_MARKERS = ("x", "+", "1", "2")
MOST_ARMS = len(COLORS) * len(DASHES)
LABEL_GAP = 0.175  # inches between two labels at the line ends


def arm_label(arm: str, protected: bool) -> str:
    """The name of an arm on a chart."""
    return f"{arm}{PROMPT}" if protected else arm


def pareto_figure(cells: pd.DataFrame, *, nulls: Collection[str] = NULLS, caveat: str = TINY_CAVEAT) -> Figure:
    """Pass@1 against KV budget, one panel per dataset, one line per arm, named where it ends; full cache as a level.

    cells: CELL_COLUMNS, of one model; kv_budget in slots, NaN for the full cache; shares and Pass@1 as in cells_table.
    nulls: arms drawn grey and dashed. caveat: the sentence under the chart; the default is only true of tiny models.
    Raises ConfigError for a missing column, a cell that is there twice, a value that is not a number, several models
    or more than MOST_ARMS arms.
    """
    cells = _checked_cells(cells)
    widest = ((cells["pass_high"] - cells["pass_low"]) / 2).max()
    notes = [
        f"{_samples(cells)}, n = problems. The 95 % interval of one point is at most ±{widest:.1f} points wide; the "
        "table has each, and arms are compared by their paired differences.",
        caveat,
    ]
    panels = [
        _Panel(f"{_model(cells)} | {dataset} (n = {here['n_problems'].iloc[0]})", "Pass@1 (%)", here, "pass_at_1", 100)
        for dataset, here in cells.groupby("dataset", sort=False)
    ]
    return _budget_figure(panels, f"Measured here: {_model(cells)}, Pass@1 against KV budget", notes, nulls)


def length_figure(cells: pd.DataFrame, *, nulls: Collection[str] = NULLS, caveat: str = TINY_CAVEAT) -> Figure:
    """Mean output tokens, and the share of outputs cut at the length limit, against KV budget; a row per dataset.

    Arguments and errors as in pareto_figure. Eviction changes how long outputs are, so tokens/s alone misleads.
    """
    cells = _checked_cells(cells)
    cells = cells.assign(truncated=100 * cells["truncated_share"])
    panels = []
    for dataset, here in cells.groupby("dataset", sort=False):
        name = f"{_model(cells)} | {dataset} (n = {here['n_problems'].iloc[0]})"
        panels += [
            _Panel(name, "Mean output (tokens)", here, "mean_tokens"),
            _Panel(name, "Truncated (%)", here, "truncated"),
        ]
    notes = [f"{_samples(cells)}, n = problems. Truncated: cut at the length limit, without an answer.", caveat]
    return _budget_figure(panels, f"Measured here: {_model(cells)}, output length against KV budget", notes, nulls)


def memory_figure(cells: pd.DataFrame, *, nulls: Collection[str] = NULLS, caveat: str = TINY_CAVEAT) -> Figure:
    """Pass@1 against what one row of the cache takes, kib_per_row: slots, and the queries and state a policy keeps.

    Arguments and errors as in pareto_figure. Equal KV budgets are not equal memory for a policy that keeps queries.
    """
    cells = _checked_cells(cells)
    evicting = cells[cells["label"] != FULL]
    styles = _styles(list(evicting["label"].unique()), nulls)
    places = sorted(evicting["kib_per_row"].unique())

    def draw(ax, room: float, dataset: str) -> None:
        here = evicting[evicting["dataset"] == dataset]
        series = {}
        for label, arm in here.groupby("label", sort=False):
            rate = dict(zip(arm["kib_per_row"], arm["pass_at_1"], strict=True))
            series[label] = [rate.get(place, math.nan) for place in places]
        ax.set_title(f"{_model(cells)} | {dataset} (n = {here['n_problems'].iloc[0]})", color=INK)
        ax.set(ylabel="Pass@1 (%)", xlabel="Cache of one row (KiB)", ylim=(0, 104))
        _draw_lines(ax, places, series, styles, room, joined=True)

    notes = [f"{_samples(cells)}, n = problems. Memory: keys, values, positions, query ring and policy state.", caveat]
    draws = [lambda ax, room, name=name: draw(ax, room, name) for name in evicting["dataset"].unique()]
    return _figure(draws, list(styles), f"Measured here: {_model(cells)}, Pass@1 against memory", notes)


def cells_table(cells: pd.DataFrame) -> pd.DataFrame:
    """The numbers of pareto_figure and length_figure as text, one row per cell, the full cache last in each dataset.

    cells: CELL_COLUMNS; pass_* in percent, truncated_share from 0 to 1, mean_live_slots per KV head, kib_per_row: keys,
    values, positions, query ring and policy state of one row,
    seconds_per_solved of decoding, round_us_per_row: microseconds of one round on one row; the last three may be NaN.
    """
    cells = _checked_cells(cells)
    order = {name: i for i, name in enumerate(cells["dataset"].unique())}
    cells = cells.assign(order=cells["dataset"].map(order)).sort_values(
        ["order", "kv_budget", "pass_at_1"], ascending=[True, True, False], na_position="last", kind="stable"
    )
    return pd.DataFrame(
        {
            "Dataset": cells["dataset"],
            "KV budget": cells["kv_budget"].map(_budget_text),
            "Arm": cells["label"],
            "n": cells["n_problems"].map(str),
            "Pass@1 (%) with 95 % interval": [
                f"{row.pass_at_1:.1f} ({row.pass_low:.1f} to {row.pass_high:.1f})" for row in cells.itertuples()
            ],
            "Mean output (tokens)": cells["mean_tokens"].map("{:.0f}".format),
            "Truncated (%)": (100 * cells["truncated_share"]).map("{:.1f}".format),
            "Mean live slots": cells["mean_live_slots"].map(lambda value: _number(value, "{:.0f}")),
            "Cache (KiB per row)": cells["kib_per_row"].map(lambda value: _number(value, "{:.0f}")),
            "Seconds per solved problem": cells["seconds_per_solved"].map(lambda value: _number(value, "{:.3g}")),
            "Round (µs per row)": cells["round_us_per_row"].map(lambda value: _number(value, "{:.0f}")),
        }
    ).reset_index(drop=True)


def difference_figure(
    differences: pd.DataFrame, baseline: str, *, nulls: Collection[str] = NULLS, caveat: str = TINY_CAVEAT
) -> Figure:
    """Forest plot: each arm's Pass@1 minus the baseline arm's, in points, with its interval, best on top.

    differences: DIFFERENCE_COLUMNS, as kvlib.stats.differences_to returns them. A filled point has an interval
    without zero. Raises ConfigError for a missing column or a value that is not a number.
    """
    rows = _required(differences, DIFFERENCE_COLUMNS, "the differences", DIFFERENCE_COLUMNS[1:])
    rows = rows.sort_values("difference", kind="stable")
    n, text_room = len(rows), 3.05
    left = 0.3 + 0.085 * max(len(name) for name in rows["arm"])
    width = left + 4.6 + text_room
    notes = [
        f"Paired over {rows['n_problems'].max()} problems on common random numbers, 95 % interval from resampled "
        f"problems. Filled: the interval excludes 0. Intervals are not corrected for comparing {n} arms.",
        caveat,
    ]
    with style():
        fig, bottom, top = _sheet(
            width, 0.27 * n + 0.2, 1, f"Measured here: Pass@1 against {baseline}, paired", notes, title=0.32
        )
        height = fig.get_size_inches()[1]
        ax = fig.add_axes((left / width, bottom / height, 4.6 / width, 1 - (bottom + top) / height))
        ax.axvline(0, color=INK, linewidth=1)
        for y, row in enumerate(rows.itertuples()):
            sure = row.low > 0 or row.high < 0
            color = GREY if _is_null(row.arm, nulls) else BLUE if row.difference >= 0 else ORANGE
            ax.plot([row.low, row.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
            ax.plot(row.difference, y, "o", color=color, markersize=7.5, markerfacecolor=color if sure else "white",
                    markeredgewidth=1.6)  # fmt: skip
            text = _signed(row)
            for x, words in ((0.1, text), (1.85, f"{row.wins} : {row.losses}")):
                ax.annotate(words, (1, y), (72 * x, 0), xycoords=("axes fraction", "data"),
                            textcoords="offset points", va="center", size=9.5, color=INK)  # fmt: skip
        for x, words in ((0.1, "points (95 % interval)"), (1.85, "wins : losses")):
            ax.annotate(words, (1, 1), (72 * x, 5), xycoords="axes fraction", textcoords="offset points", va="bottom",
                        size=9.5, color=INK, weight="bold")  # fmt: skip
        ax.set(
            yticks=range(n), yticklabels=rows["arm"], ylim=(-0.6, n - 0.4), xlabel=f"Pass@1 minus {baseline} (points)"
        )
        ax.grid(axis="x", color="#DDDDDD", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["left", "right"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    return fig


def difference_table(differences: pd.DataFrame) -> pd.DataFrame:
    """The numbers of difference_figure as text, best first."""
    rows = _required(differences, DIFFERENCE_COLUMNS, "the differences", DIFFERENCE_COLUMNS[1:])
    rows = rows.sort_values("difference", ascending=False, kind="stable")
    return pd.DataFrame(
        {
            "Arm": rows["arm"],
            "Difference (points) with 95 % interval": [_signed(row) for row in rows.itertuples()],
            "Problems won": rows["wins"].map(str),
            "Problems lost": rows["losses"].map(str),
            "n": rows["n_problems"].map(str),
        }
    ).reset_index(drop=True)


def fidelity_figure(
    fidelity: pd.DataFrame, model: str, *, nulls: Collection[str] = NULLS, caveat: str = TINY_CAVEAT
) -> Figure:
    """Attention-mass recall (higher is better) and output error (lower is better) against KV budget, a line per arm.

    fidelity: FIDELITY_COLUMNS, as kvlib.replay.fidelity returns them, shares from 0 to 1. Errors as in pareto_figure.
    """
    rows = _required(fidelity, FIDELITY_COLUMNS, "the replays", ["n_traces", "recall", "error"])
    rows = rows[rows["kv_budget"].notna()].assign(label=rows["arm"])
    if rows.empty:
        raise ConfigError("only the full cache was replayed, and it loses nothing; replay arms with a KV budget")
    _once(rows, ["label", "kv_budget"])
    rows = rows.assign(recall=100 * rows["recall"], error=100 * rows["error"])
    panels = [
        _Panel("Attention still reached", "Attention-mass recall (%)", rows, "recall", 100),
        _Panel("Change of attention's output", "Output error ‖o − o'‖ / ‖o‖ (%)", rows, "error"),
    ]
    notes = [
        f"Teacher-forced replays of {rows['n_traces'].max()} traces; means over layers, heads and queries, with those "
        "before the first round. Recall: share of the full cache's attention that falls on slots still held.",
        caveat,
    ]
    return _budget_figure(panels, f"Measured here: {model}, what eviction loses", notes, nulls)


def fidelity_table(fidelity: pd.DataFrame) -> pd.DataFrame:
    """The numbers of fidelity_figure as text."""
    rows = _required(fidelity, FIDELITY_COLUMNS, "the replays", ["n_traces", "recall", "error"])
    rows = rows.sort_values(["kv_budget", "recall"], ascending=[True, False], na_position="last", kind="stable")
    return pd.DataFrame(
        {
            "KV budget": rows["kv_budget"].map(_budget_text),
            "Arm": rows["arm"],
            "Traces": rows["n_traces"].map(str),
            "Attention-mass recall (%)": (100 * rows["recall"]).map("{:.1f}".format),
            "Output error (%)": (100 * rows["error"]).map("{:.1f}".format),
        }
    ).reset_index(drop=True)


def fact_figure(
    facts: pd.DataFrame, model: str, *, nulls: Collection[str] = NULLS, caveat: str = TINY_CAVEAT
) -> Figure:
    """Share of once-told values known when they are looked up, against the distance in tokens; a panel per KV budget.

    facts: FACT_COLUMNS, as kvlib.replay.fact_accuracy returns them, right, low and high in percent. Rows of the full
    cache are drawn in every panel. Errors as in pareto_figure.
    """
    rows = _required(facts, FACT_COLUMNS, "the look-ups", ["distance_low", "distance_high", "n", "right"])
    rows = rows.assign(label=rows["arm"].where(rows["kv_budget"].notna(), FULL))
    _once(rows, ["label", "kv_budget", "distance_low"])
    full, rows = rows[rows["label"] == FULL], rows[rows["label"] != FULL]
    if rows.empty:
        raise ConfigError("only the full cache was probed; replay arms with a KV budget beside it")
    bins = sorted({(row.distance_low, row.distance_high) for row in rows.itertuples()})
    counts = rows.groupby("distance_low")["n"].max()
    ticks = [f"{low}–{high - 1}\nn = {counts[low]}" for low, high in bins]
    styles = _styles(list(rows["label"].unique()), nulls)
    widest = ((rows["high"] - rows["low"]) / 2).max()
    notes = [
        "Teacher-forced: the model's own choice in place of a value that was told once, and not restated since. n = "
        f"look-ups. The 95 % interval (Wilson) of one point is at most ±{widest:.1f} points wide; the table has each.",
        caveat,
    ]

    def draw(ax, room, budget):
        here = pd.concat([rows[rows["kv_budget"] == budget], full])
        series = {
            label: [group.set_index("distance_low")["right"].get(low, math.nan) for low, _ in bins]
            for label, group in here.groupby("label", sort=False)
        }
        ax.set_title(f"KV budget {budget:.0f}", color=INK)
        ax.set(xlabel="Distance from the told value (tokens)", ylabel="Known (%)", ylim=(0, 104))
        ax.set_xticks(range(len(bins)), ticks)
        _draw_lines(ax, range(len(bins)), series, styles, room)

    return _figure(
        [lambda ax, room, budget=budget: draw(ax, room, budget) for budget in sorted(rows["kv_budget"].unique())],
        [*styles, FULL],
        f"Measured here: {model}, facts told once",
        notes,
        below=0.16,
    )


def fact_table(facts: pd.DataFrame) -> pd.DataFrame:
    """The numbers of fact_figure as text."""
    rows = _required(facts, FACT_COLUMNS, "the look-ups", FACT_COLUMNS[2:])
    rows = rows.sort_values(["kv_budget", "distance_low", "right"], ascending=[True, True, False], kind="stable")
    return pd.DataFrame(
        {
            "KV budget": rows["kv_budget"].map(_budget_text),
            "Distance (tokens)": [f"{row.distance_low}–{row.distance_high - 1}" for row in rows.itertuples()],
            "Arm": rows["arm"].where(rows["kv_budget"].notna(), FULL),
            "n": rows["n"].map(str),
            "Known (%) with 95 % interval": [
                f"{row.right:.1f} ({row.low:.1f} to {row.high:.1f})" for row in rows.itertuples()
            ],
        }
    ).reset_index(drop=True)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places nearest to the wanted ones (least squares), in their order, at least gap apart, from low to high.

    Raises ConfigError if they do not fit.
    """
    if (len(wanted) - 1) * gap > high - low + 1e-9:
        raise ConfigError(f"{len(wanted)} labels do not fit on one axis; draw fewer arms per chart")
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    blocks: list[list[float]] = []  # [sum, count] of neighbours that share one offset, as in isotonic regression
    for rank, i in enumerate(order):
        blocks.append([wanted[i] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    offsets = itertools.chain.from_iterable([total / count] * count for total, count in blocks)
    last = high - (len(wanted) - 1) * gap
    places = [0.0] * len(wanted)
    for rank, (i, offset) in enumerate(zip(order, offsets, strict=True)):
        places[i] = min(max(offset, low), last) + rank * gap
    return places


class _Panel:
    """One quantity of the rows `here` (label, kv_budget) against the KV budget; top: where its axis ends, if fixed."""

    def __init__(self, title: str, ylabel: str, here: pd.DataFrame, column: str, top: float | None = None):
        self.title, self.ylabel, self.here, self.column, self.top = title, ylabel, here, column, top

    def draw(self, ax, room: float, budgets: list[int], places: list[float], styles: Mapping, xlabel: str) -> None:
        table = self.here.pivot_table(index="label", columns="kv_budget", values=self.column, dropna=False, sort=False)
        series = {label: [row.get(b, math.nan) for b in budgets] for label, row in table.iterrows() if label != FULL}
        full = self.here.loc[self.here["label"] == FULL, self.column]
        if len(full):
            series[FULL] = [full.iloc[0]] * len(budgets)
        top = self.top or max(max(filter(math.isfinite, values), default=0) for values in series.values()) or 1
        ax.set_title(self.title, color=INK)
        ax.set(ylabel=self.ylabel, xlabel=xlabel, ylim=(0, 1.04 * top))
        ax.set_xticks(places, [str(b) for b in budgets])
        _draw_lines(ax, places, series, styles, room)


def _budget_figure(panels: list[_Panel], heading: str, notes: list[str], nulls: Collection[str]) -> Figure:
    rows = pd.concat([panel.here for panel in panels])
    budgets = sorted(int(budget) for budget in rows["kv_budget"].dropna().unique())
    if not budgets:
        raise ConfigError("no cell has a KV budget, so there is nothing to put on the x axis; add arms that evict")
    # As in the measured chart: uneven budgets become equal steps.
    even = len({b - a for a, b in itertools.pairwise(budgets)}) <= 1
    places = budgets if even else list(range(len(budgets)))
    xlabel = "KV Budget" if even else "KV Budget (not to scale)"
    styles = _styles([label for label in rows["label"].unique() if label != FULL], nulls)
    return _figure(
        [lambda ax, room, panel=panel: panel.draw(ax, room, budgets, places, styles, xlabel) for panel in panels],
        [*styles, FULL],
        heading,
        notes,
    )


def _figure(draws: list, labels: Sequence[str], heading: str, notes: list[str], below: float = 0.0) -> Figure:
    """Panels in rows of two, each with room to its right for the labels of its lines; sizes in inches."""
    left, panel, room = 0.72, 3.9, 0.62 + 0.078 * max(map(len, labels))
    per_row = min(2, len(draws))
    n_rows = -(-len(draws) // per_row)
    tall = max(2.75, LABEL_GAP * (len(labels) + 1))
    width = max(8.0, per_row * (left + panel + room))
    under, title = 0.55 + below, 0.4
    with style():
        fig, bottom, _ = _sheet(width, tall, n_rows, heading, notes, title=title, under=under)
        height = fig.get_size_inches()[1]
        for i, draw in enumerate(draws):
            row, column = divmod(i, per_row)
            x = left + column * (left + panel + room)
            y = bottom + (n_rows - 1 - row) * (tall + under + title)
            ax = fig.add_axes((x / width, y / height, panel / width, tall / height))
            draw(ax, tall)
            ax.grid(axis="y", color="#DDDDDD", linewidth=0.7)
            ax.set_axisbelow(True)
            ax.spines["right"].set_visible(False)
    return fig


def _sheet(width, tall, n_rows, heading, notes, *, title, under=0.55) -> tuple[Figure, float, float]:
    """A figure for n_rows of axes `tall` inches high under a heading and over wrapped notes; (fig, bottom, top)."""
    lines = [line for note in notes if note for line in textwrap.wrap(note, int(width * 11.9))]
    bottom, top = under + 0.2 + 0.21 * len(lines), 0.34 + title
    height = top + bottom + n_rows * tall + (n_rows - 1) * (under + title)
    fig = Figure(figsize=(width, height), dpi=100, facecolor="white")
    strips = [(heading, "#20344A", "white")]
    dress(fig, strips, lines)
    return fig, bottom, top


def _draw_lines(
    ax, x: Sequence[float], series: Mapping[str, Sequence[float]], styles: Mapping, tall: float, joined: bool = False
) -> None:
    """One line per label and its name right of the axes, `tall` inches high, joined to the line's last point.

    A missing value breaks the line, unless its points are joined.
    """
    x = list(x)
    step = (x[-1] - x[0]) / 5 if joined else x[1] - x[0] if len(x) > 1 else 1
    ax.set_xlim(x[0] - 0.35 * step, x[-1] + 0.35 * step)
    # Ticks above the axis are not drawn, but their words still count as there.
    ax.set_yticks([tick for tick in ax.get_yticks() if tick <= ax.get_ylim()[1]])
    ends = {}
    for label, values in series.items():
        known = [(a, value) for a, value in zip(x, values, strict=True) if not math.isnan(value)]
        if known:
            look = styles.get(label, {"color": INK, "linestyle": (0, (4, 2.5)), "linewidth": 1.3})
            ax.plot(
                *(zip(*known, strict=True) if joined else (x, values)),
                label=label,
                zorder=2 if look["color"] == GREY else 3,
                **look,
            )
            ends[label] = (known[-1], look)
    to_inches = tall / (ax.get_ylim()[1] - ax.get_ylim()[0])
    heights = [(end[1] - ax.get_ylim()[0]) * to_inches for end, _ in ends.values()]
    places = spread(heights, LABEL_GAP, 0.06, tall - 0.06)
    right = ax.get_xlim()[1]
    for (label, (end, look)), place in zip(ends.items(), places, strict=True):
        y = place / tall
        across = ax.get_yaxis_transform()  # x in shares of the axes, y in data
        y_data = ax.get_ylim()[0] + y * (ax.get_ylim()[1] - ax.get_ylim()[0])
        reach = (end[0] - ax.get_xlim()[0]) / (right - ax.get_xlim()[0])
        ax.plot([reach, 1.03], [end[1], y_data], transform=across, color=look["color"], linewidth=0.7, alpha=0.7,
                clip_on=False, label="_leader")  # fmt: skip
        ax.plot([1.03, 1.065, 1.10], [y_data] * 3, transform=across, clip_on=False, label="_key", markevery=[1], **look)
        ax.text(1.115, y_data, label, transform=across, va="center", size=9, color=INK, gid="line-end")


def _styles(labels: list[str], nulls: Collection[str]) -> dict[str, dict]:
    """{label: line properties}: colour, marker and dashes differ together; nulls are grey and dashed."""
    scored = [label for label in labels if not _is_null(label, nulls)]
    if len(scored) > MOST_ARMS:
        raise ConfigError(f"{len(scored)} arms are more than the {MOST_ARMS} that can be told apart; draw fewer")
    common = {"linewidth": 1.7, "markersize": 6.2, "markeredgewidth": 1.0}
    styles = {}
    for i, label in enumerate(label for label in labels if label not in scored):
        styles[label] = {**common, "color": GREY, "linestyle": "--", "marker": NULL_MARKERS[i % len(NULL_MARKERS)]}
    for i, label in enumerate(scored):
        look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        styles[label] = {**common, **look, "linestyle": DASHES[i // len(COLORS)], "markeredgecolor": "white"}
    return {label: styles[label] for label in labels}


def _is_null(label: str, nulls: Collection[str]) -> bool:
    return label.casefold().removesuffix(PROMPT) in {name.casefold() for name in nulls}


def _required(df: pd.DataFrame, columns: list[str], what: str, numbers: list[str]) -> pd.DataFrame:
    missing = [name for name in columns if name not in df]
    if missing or df.empty:
        lacking = f"column {', '.join(missing)}" if missing else "rows"
        raise ConfigError(f"{what} lack {lacking}; pass one row per point with the columns {', '.join(columns)}")
    for name in numbers:
        values = pd.to_numeric(df[name], errors="coerce")
        if not np.isfinite(values).all():
            row = df[~np.isfinite(values)].iloc[0]
            place = ", ".join(str(row[column]) for column in ("dataset", "arm", "kv_budget") if column in df)
            raise ConfigError(
                f"{name} of {place} is {row[name]}; leave out what was not measured, every point is drawn"
            )
    return df


def _once(rows: pd.DataFrame, key: list[str]) -> None:
    twice = rows[rows.duplicated(key)]
    if len(twice):
        raise ConfigError(f"{', '.join(str(twice.iloc[0][name]) for name in key)} is there twice; pass it once")


def _checked_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with their labels, checked so that whatever is drawn can be trusted."""
    numbers = ["n_problems", "n_samples", "pass_at_1", "pass_low", "pass_high", "mean_tokens", "truncated_share"]
    cells = _required(cells, CELL_COLUMNS, "the cells", numbers)
    if cells["model"].nunique() > 1:
        raise ConfigError(f"one model per chart, got {', '.join(cells['model'].unique())}; pass the rows of one")
    labels = [FULL if pd.isna(row.kv_budget) else arm_label(row.arm, bool(row.protected)) for row in cells.itertuples()]
    cells = cells.assign(label=labels)
    _once(cells, ["dataset", "label", "kv_budget"])
    return cells


def _model(cells: pd.DataFrame) -> str:
    return cells["model"].iloc[0]


def _samples(cells: pd.DataFrame) -> str:
    low, high = cells["n_samples"].min(), cells["n_samples"].max()
    return (
        f"{low} sample{'s' if low > 1 else ''} per problem" if low == high else f"{low} to {high} samples per problem"
    )


def _budget_text(budget: float) -> str:
    return FULL if pd.isna(budget) else f"{budget:.0f}"


def _signed(row) -> str:
    return f"{row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f})".replace("-", "−")


def _number(value: float, form: str) -> str:
    return "–" if pd.isna(value) else form.format(value)
