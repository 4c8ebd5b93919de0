"""Many arms on the same problems -> charts of lines over KV budget or memory, differences, and the tables beneath.

An arm is a policy with its settings; the label of an arm whose prompt is protected ends in "+prompt".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from kvlib.charts.rows import alike, budget_text, intervals, once, order, required, samples_text, signed_interval, texts
from kvlib.charts.sheet import FULL, GREY, INK, PROMPT, banner, budget_places, caveat_of, legend, looks, sheet, style
from kvlib.errors import ConfigError

CELL_COLUMNS = [
    "model", "dataset", "arm", "kv_budget", "protected", "n_problems", "n_samples", "pass_at_1", "pass_low",
    "pass_high", "mean_tokens", "max_new_tokens", "truncated_share", "mean_live_slots", "kib_per_row",
    "seconds_per_solved", "round_us_per_row",
]  # fmt: skip
DIFFERENCE_COLUMNS = ["arm", "difference", "low", "high", "wins", "losses", "n_problems"]


def arm_label(arm: str, protected: bool) -> str:
    """The name of an arm on a chart."""
    return f"{arm}{PROMPT}" if protected else arm


@dataclass
class Panel:
    """One axes: points (columns label, x, y, and low, high if there is an interval), and named levels across it."""

    title: str
    ylabel: str
    points: pd.DataFrame
    top: float | None = None  # where its axis ends, if fixed
    levels: dict[str, float] = field(default_factory=dict)


def pareto_figure(cells: pd.DataFrame) -> Figure:
    """Pass@1 against KV budget, one panel per dataset, one line per arm with its intervals; full cache as a level.

    cells: CELL_COLUMNS, of one model; kv_budget in slots, NaN for the full cache; shares and Pass@1 as in cells_table.
    An arm on fewer problems than the others says how many in its name. Raises ConfigError for a missing column, a cell
    that is there twice, a value that is not a number, or several models.
    """
    cells = _checked_cells(cells)
    panels = [_pass_panel(here, "kv_budget") for _, here in cells.groupby("dataset", sort=False)]
    notes = [f"{_samples(cells)}, n = problems, whiskers: 95 % interval; points stand side by side at their KV budget. "
             "Arms are compared by their paired differences, not by these intervals."]  # fmt: skip
    return budget_figure(panels, _heading("Pass@1 against KV budget", cells), [*notes, *caveat_of(_model(cells))])


def memory_figure(cells: pd.DataFrame) -> Figure:
    """Pass@1 against what one row of the cache takes, kib_per_row: slots, and the queries and state a policy keeps.

    Arguments and errors as in pareto_figure. Equal KV budgets are not equal memory for a policy that keeps queries.
    """
    cells = _checked_cells(cells)
    panels = [_pass_panel(here, "kib_per_row") for _, here in cells.groupby("dataset", sort=False)]
    full = cells.loc[cells["label"] == FULL, "kib_per_row"].sort_values()
    takes = dict.fromkeys(f"{kib:,.0f}" for kib in full.iloc[[0, -1]]) if len(full) else {}
    notes = [
        f"{_samples(cells)}, n = problems, whiskers: 95 % interval. Memory: keys, values, positions, query ring and "
        "policy state." + (f" The full cache, a level, takes {' to '.join(takes)} KiB a row." if takes else ""),
        *caveat_of(_model(cells)),
    ]
    return lines_figure(panels, _heading("Pass@1 against memory", cells), notes, "Cache of one row (KiB)")


def length_figure(cells: pd.DataFrame) -> Figure:
    """Mean output tokens, and the share of outputs cut at the length limit, against KV budget; a row per dataset.

    Arguments and errors as in pareto_figure. Eviction changes how long outputs are, so tokens/s alone misleads.
    """
    cells = _checked_cells(cells).assign(truncated=lambda df: 100 * df["truncated_share"])
    panels = []
    for _, here in cells.groupby("dataset", sort=False):
        evicting, full, limit = here[here["label"] != FULL], here[here["label"] == FULL], here["max_new_tokens"].max()
        for column, ylabel, top, cap in [
            ("mean_tokens", "Mean output (tokens)", 1.05 * limit, {f"limit: {limit} tokens": limit}),
            ("truncated", "Truncated (%)", 104, {}),
        ]:
            points = evicting.assign(x=evicting["kv_budget"], y=evicting[column])
            levels = dict(zip(full["label"], full[column], strict=True)) | cap
            panels.append(Panel(_title(here), ylabel, points, top, levels))
    notes = [f"{_samples(cells)}, n = problems. Truncated: cut at the limit of {cells['max_new_tokens'].max()} new "
             "tokens, without an answer.", *caveat_of(_model(cells))]  # fmt: skip
    return budget_figure(panels, _heading("output length against KV budget", cells), notes)


def cells_table(cells: pd.DataFrame) -> pd.DataFrame:
    """The numbers of pareto_figure and length_figure as text, one row per cell, the full cache last in each dataset.

    cells: CELL_COLUMNS; pass_* in percent, truncated_share from 0 to 1, mean_live_slots per KV head, kib_per_row: keys,
    values, positions, query ring and policy state of one row, seconds_per_solved of decoding, round_us_per_row:
    microseconds of one round on one row; the last three may be NaN.
    """
    cells = order(_checked_cells(cells))
    return pd.DataFrame(
        {
            "Dataset": cells["dataset"].tolist(),
            "KV budget": cells["kv_budget"].map(budget_text).tolist(),
            "Arm": cells["label"].tolist(),
            "n": texts(cells["n_problems"]),
            "Pass@1 (%) with 95 % interval": intervals(cells, ["pass_at_1", "pass_low", "pass_high"]),
            "Mean output (tokens)": texts(cells["mean_tokens"]),
            "Truncated (%)": texts(100 * cells["truncated_share"], "{:.1f}"),
            "Mean live slots": texts(cells["mean_live_slots"]),
            "Cache (KiB per row)": texts(cells["kib_per_row"]),
            "Seconds per solved problem": texts(cells["seconds_per_solved"], "{:.3g}"),
            "Round (µs per row)": texts(cells["round_us_per_row"]),
        }
    )


def difference_figure(differences: pd.DataFrame, baseline: str, model: str, datasets: Sequence[str] = ()) -> Figure:
    """Forest plot: each arm's Pass@1 minus the baseline arm's, in points, with its interval, best on top.

    differences: DIFFERENCE_COLUMNS, as kvlib.stats.differences_to returns them. A filled point has an interval
    without zero. Raises ConfigError for a missing column or a value that is not a number.
    """
    rows = required(differences, DIFFERENCE_COLUMNS, "the differences", DIFFERENCE_COLUMNS[1:])
    rows = rows.sort_values("difference", kind="stable")
    n = len(rows)
    notes = [
        f"Paired over {rows['n_problems'].max()} problems on common random numbers, 95 % interval from resampled "
        f"problems. Filled: the interval excludes 0. Intervals are not corrected for comparing {n} arms.",
        *caveat_of(model),
    ]
    with style():
        margins = (0.3 + 0.085 * max(len(name) for name in rows["arm"]), 0.1, 0.45, 0.6)
        heading = banner(f"Pass@1 against {baseline}, paired", model, datasets)
        fig, (ax,) = sheet(heading, notes, 1, (4.6, 0.27 * n + 0.2), margins, 1, edge=2.95)
        ax.axvline(0, color=INK, linewidth=1)
        for y, row in enumerate(rows.itertuples()):
            sure = row.low > 0 or row.high < 0
            look = looks([row.arm])[row.arm]
            color = look["color"]
            ax.plot([row.low, row.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
            ax.plot(row.difference, y, look["marker"], color=color, markersize=7.5, markeredgewidth=1.6,
                    markerfacecolor=color if sure else "white")  # fmt: skip
            for x, words in ((0.1, signed_interval(row)), (1.85, f"{row.wins} : {row.losses}")):
                ax.annotate(words, (1, y), (72 * x, 0), xycoords=("axes fraction", "data"),
                            textcoords="offset points", va="center", size=9.5, color=INK)  # fmt: skip
        for x, words in ((0.1, "points (95 % interval)"), (1.85, "wins : losses")):
            ax.annotate(words, (1, 1), (72 * x, 5), xycoords="axes fraction", textcoords="offset points", va="bottom",
                        size=9.5, color=INK, weight="bold")  # fmt: skip
        ax.set(yticks=range(n), yticklabels=rows["arm"], ylim=(-0.6, n - 0.4),
               xlabel=f"Pass@1 minus {baseline} (points)")  # fmt: skip
        ax.grid(axis="x")
        ax.spines[["left", "right"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    return fig


def difference_table(differences: pd.DataFrame, cells: pd.DataFrame | None = None) -> pd.DataFrame:
    """The numbers of difference_figure as text, best first; with cells, also what the arm's cache takes on average.

    cells: CELL_COLUMNS of the cells compared; equal KV budgets are not equal memory.
    """
    rows = required(differences, DIFFERENCE_COLUMNS, "the differences", DIFFERENCE_COLUMNS[1:])
    rows = rows.sort_values("difference", ascending=False, kind="stable")
    table = pd.DataFrame(
        {
            "Arm": rows["arm"].tolist(),
            "Difference (points) with 95 % interval": [signed_interval(row) for row in rows.itertuples()],
            "Problems won": texts(rows["wins"]),
            "Problems lost": texts(rows["losses"]),
            "n": texts(rows["n_problems"]),
        }
    )
    if cells is not None:
        memory = _checked_cells(cells).groupby("label")["kib_per_row"].mean()
        table["Mean cache (KiB per row)"] = texts(table["Arm"].map(memory), missing="nan")
    return table


def rankings_table(rankings: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The arms that several comparisons have, with their place and difference in each; best first in the first.

    rankings: DIFFERENCE_COLUMNS by the comparison's name, as kvlib.stats.differences_to returns them.
    """
    ranked = {}
    for name, rows in rankings.items():
        once(rows, ["arm"])
        ranked[name] = required(rows, DIFFERENCE_COLUMNS, name, DIFFERENCE_COLUMNS[1:]).set_index("arm")
    first = next(iter(ranked.values())).sort_values("difference", ascending=False, kind="stable")
    arms = [arm for arm in first.index if all(arm in rows.index for rows in ranked.values())]
    table = {"Arm": arms}
    for name, rows in ranked.items():
        here = rows.loc[arms]
        places = here["difference"].rank(ascending=False, method="min").astype(int)
        table[f"{name}: place"] = places.tolist()
        table[f"{name}: difference (points) with 95 % interval"] = [signed_interval(row) for row in here.itertuples()]
    return pd.DataFrame(table)


def _pass_panel(here: pd.DataFrame, x: str) -> Panel:
    full, evicting = here[here["label"] == FULL], here[here["label"] != FULL]
    points = evicting.rename(columns={"pass_at_1": "y", "pass_low": "low", "pass_high": "high"}).assign(x=evicting[x])
    levels = dict(zip(full["label"], full["pass_at_1"], strict=True))
    return Panel(_title(here), "Pass@1 (%)", points, 104, levels)


def budget_figure(panels: list[Panel], heading: str, notes: list[str]) -> Figure:
    budgets = sorted({int(budget) for panel in panels for budget in panel.points["x"].dropna()})
    if not budgets:
        raise ConfigError("no cell has a KV budget, so there is nothing to put on the x axis; add arms that evict")
    return lines_figure(panels, heading, notes, budget_places(budgets)[1], {budget: str(budget) for budget in budgets})


def lines_figure(
    panels: list[Panel], heading: str, notes: list[str], xlabel: str, ticks: Mapping[int, str] | None = None,
    below: float = 0.6,
) -> Figure:  # fmt: skip
    """The panels in rows of two, one legend for all, best of the first panel first.

    ticks: {x: its words}, at equal steps, arms side by side; None: x is to scale.
    """
    first = panels[0].points.groupby("label", sort=False)["y"].mean().sort_values(ascending=False)
    found = [*first.index, *(label for panel in panels[1:] for label in panel.points["label"])]
    levels = dict.fromkeys(label for panel in panels for label in panel.levels)
    labels = [FULL] * (FULL in [*levels, *found]) + [label for label in dict.fromkeys(found) if label != FULL]
    limits = [name for name in levels if name != FULL]
    styles = looks(labels) | {name: {"color": GREY, "linestyle": ":", "linewidth": 1.6} for name in limits}
    edge = 0.75 + 0.08 * max(map(len, styles), default=0)
    with style():
        tall = max(2.6, 0.2 * (len(styles) + 1) if len(panels) < 3 else 0)
        fig, axes = sheet(heading, notes, len(panels), (3.9, tall), (0.75, 0.2, 0.45, below), edge=edge)
        for ax, panel in zip(axes, panels, strict=True):
            places = {x: i for i, x in enumerate(ticks)} if ticks else {}
            evicting = [label for label in labels if label != FULL]
            for label, arm in panel.points.groupby("label", sort=False):
                arm, color = arm.sort_values("x"), styles[label]["color"]
                aside = 0 if label == FULL else (evicting.index(label) - (len(evicting) - 1) / 2) * 0.5 / len(evicting)
                x = arm["x"].map(places) + aside if ticks else arm["x"]
                whiskers = arm[["low", "high"]] if "low" in arm else arm.assign(low=math.nan, high=math.nan)
                if label != FULL and whiskers["low"].notna().any():
                    ax.vlines(x, whiskers["low"], whiskers["high"], color=color, linewidth=1, alpha=0.6)
                ax.plot(x, arm["y"], label=label, zorder=2 if color == GREY else 3, **styles[label])
            for name, level in panel.levels.items():
                ax.axhline(level, label=name, **styles[name])
            ax.set_title(panel.title, color=INK)
            ax.set(ylabel=panel.ylabel, xlabel=xlabel, ylim=(0, panel.top or 1.04 * ax.get_ylim()[1]))
            if ticks:
                ax.set_xticks([*places.values()], ticks.values())
                ax.set_xlim(-0.5, len(ticks) - 0.5)
            ax.grid(axis="y")
            ax.spines["right"].set_visible(False)
        legend(fig, axes, edge, styles, handlelength=2.6)
    return fig


def _checked_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with their labels, checked so that whatever is drawn can be trusted."""
    numbers = ["n_problems", "n_samples", "pass_at_1", "pass_low", "pass_high", "mean_tokens", "truncated_share"]
    cells = required(cells, CELL_COLUMNS, "the cells", numbers)
    alike(cells, ["model"])
    labels = [FULL if pd.isna(row.kv_budget) else arm_label(row.arm, bool(row.protected)) for row in cells.itertuples()]
    # An arm on fewer problems than the rest is not compared like with like: its name says so.
    fewer = cells["kv_budget"].notna() & (cells["n_problems"] < cells.groupby("dataset")["n_problems"].transform("max"))
    labels = [f"{label} (n = {n})" if few else label
              for label, n, few in zip(labels, cells["n_problems"], fewer, strict=True)]  # fmt: skip
    cells = cells.assign(label=labels)
    once(cells, ["dataset", "label", "kv_budget"])
    return cells


def _model(cells: pd.DataFrame) -> str:
    return cells["model"].iloc[0]


def _title(here: pd.DataFrame) -> str:
    """Of the panel of one dataset."""
    return f"{_model(here)} | {here['dataset'].iloc[0]} (n = {here['n_problems'].max()})"


def _heading(what: str, cells: pd.DataFrame) -> str:
    return banner(what, _model(cells), list(cells["dataset"].unique()))


def _samples(cells: pd.DataFrame) -> str:
    return f"{samples_text(cells['n_samples'])}, at most {cells['max_new_tokens'].max()} new tokens"
