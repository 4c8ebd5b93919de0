"""Replays of traces under many arms -> what eviction loses, and which facts are still known, as charts and tables."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from kvlib.charts.arms import CELL_COLUMNS, Panel, budget_figure, lines_figure
from kvlib.charts.rows import budget_text, intervals, once, required, signed_interval, texts
from kvlib.charts.sheet import FULL, banner, caveat_of
from kvlib.errors import ConfigError
from kvlib.stats import mean_interval

MEASURES = {
    "recall": ("Attention-mass recall (%)", 100, "{:.1f}"),
    "error": ("Output error (%)", 100, "{:.1f}"),
    "agreement": ("Same likeliest token (%)", 100, "{:.1f}"),
    "divergence": ("KL of the next token (nats)", 1, "{:.3f}"),
}
"""Of a replay against the full cache: what a table calls it, its factor there, its form."""
FIDELITY_COLUMNS = ["arm", "kv_budget", "trace", *MEASURES]
FACT_COLUMNS = ["arm", "kv_budget", "distance_low", "distance_high", "n", "right", "low", "high"]

FEWEST_LOOK_UPS = 10
"""Below it, what share of the values was known is no point on a chart; the table has it."""


def fidelity_figure(fidelity: pd.DataFrame, model: str, datasets: Sequence[str] = ()) -> Figure:
    """Attention that eviction loses, and the change of attention's output, against KV budget, a line per arm.

    fidelity: FIDELITY_COLUMNS, as kvlib.replay.fidelity returns them, shares from 0 to 1, a row per trace.
    Errors as in pareto_figure.
    """
    rows = _fidelity_means(fidelity)
    rows = rows[rows["kv_budget"].notna()].assign(label=rows["arm"], x=rows["kv_budget"])
    if rows.empty:
        raise ConfigError("only the full cache was replayed, and it loses nothing; replay arms with a KV budget")
    lost = rows.assign(y=100 - rows["recall"], low=100 - rows["recall_high"], high=100 - rows["recall_low"])
    moved = rows.assign(y=rows["error"], low=rows["error_low"], high=rows["error_high"])
    panels = [Panel("Attention lost", "Attention on evicted slots (%)", lost),
              Panel("Change of attention's output", "Output error ‖o − o'‖ / ‖o‖ (%)", moved)]  # fmt: skip
    notes = [
        f"Teacher-forced replays of {rows['n_traces'].max()} traces; means over layers, heads and queries, with those "
        "before the first round; whiskers: 95 % interval (bootstrap over traces). Attention lost: share of the full "
        "cache's attention that falls on slots no longer held (100 % less the recall).",
        *caveat_of(model),
    ]
    return budget_figure(panels, banner("what eviction loses", model, datasets), notes)


def fidelity_table(fidelity: pd.DataFrame, cells: pd.DataFrame | None = None) -> pd.DataFrame:
    """The numbers of fidelity_figure as text; with cells, also what the arms solved.

    cells: kvlib.charts.arms.CELL_COLUMNS of the same arms and KV budgets on one dataset.
    """
    rows = _fidelity_means(fidelity)
    rows = rows.sort_values(["kv_budget", "recall"], ascending=[True, False], na_position="last", kind="stable")
    table = pd.DataFrame(
        {
            "KV budget": rows["kv_budget"].map(budget_text).tolist(),
            "Arm": rows["arm"].tolist(),
            "Traces": texts(rows["n_traces"]),
            **{
                f"{title} with 95 % interval": intervals(rows, [name, f"{name}_low", f"{name}_high"], form)
                for name, (title, _, form) in MEASURES.items()
            },
        }
    )
    if cells is not None:
        solved = rows.merge(_solved(cells), "left", ["arm", "kv_budget"])
        table["Pass@1 (%) with 95 % interval"] = intervals(solved, ["pass_at_1", "pass_low", "pass_high"])
    return table


def correlation_table(fidelity: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each measure with Pass@1 over the arms, by KV budget; arguments as above."""
    rows = _fidelity_means(fidelity).dropna(subset="kv_budget").merge(_solved(cells), on=["arm", "kv_budget"])
    if rows.empty:
        raise ConfigError("none of the arms that were replayed is among the cells; name both of one comparison")
    table = {"Measure": [title for title, _, _ in MEASURES.values()]}
    for kv_budget, here in rows.groupby("kv_budget"):
        found = here[[*MEASURES, "pass_at_1"]].corr("spearman")["pass_at_1"]
        table[f"KV budget {kv_budget:.0f} ({len(here)} arms)"] = texts(found[[*MEASURES]], "{:+.2f}")
    return pd.DataFrame(table)


def divergence_table(fidelity: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """KL of every arm less that of the arm `baseline` on the same traces, a column per KV budget; negative is nearer.

    The interval resamples traces. Raises ConfigError where the baseline was not replayed.
    """
    rows = required(fidelity, FIDELITY_COLUMNS, "the replays", ["divergence"]).dropna(subset="kv_budget")
    once(rows, ["arm", "kv_budget", "trace"])
    if baseline not in set(rows["arm"]):
        raise ConfigError(f"{baseline!r} is none of the arms that were replayed: {', '.join(rows['arm'].unique())}")
    columns = {}
    for kv_budget, here in rows.groupby("kv_budget"):
        kl = here.pivot(index="trace", columns="arm", values="divergence")
        less = kl.drop(columns=baseline).sub(kl[baseline], axis=0).dropna(axis=1)
        found = pd.DataFrame(
            [mean_interval(less[arm].to_numpy()) for arm in less], columns=["difference", "low", "high"]
        )
        told = [signed_interval(row, 3) for row in found.itertuples()]
        columns[f"KL less that of {baseline} (nats), KV budget {kv_budget:.0f}"] = pd.Series(told, less.columns)
    nearest = rows.groupby("arm")["divergence"].mean().sort_values().index.drop(baseline)
    return pd.DataFrame(columns).reindex(nearest).fillna("–").rename_axis("Arm").reset_index()


def _solved(cells: pd.DataFrame) -> pd.DataFrame:
    cells = required(cells, CELL_COLUMNS, "the cells", ["pass_at_1"])
    once(cells, ["arm", "kv_budget"])
    return cells[["arm", "kv_budget", "pass_at_1", "pass_low", "pass_high"]]


def _fidelity_means(fidelity: pd.DataFrame) -> pd.DataFrame:
    """By arm and KV budget: n_traces, and MEASURES as a table has them, each with _low and _high (NaN of one trace)."""
    rows = required(fidelity, FIDELITY_COLUMNS, "the replays", list(MEASURES))
    once(rows, ["arm", "kv_budget", "trace"])
    means = []
    for (arm, kv_budget), group in rows.groupby(["arm", "kv_budget"], dropna=False, sort=False):
        mean = {"arm": arm, "kv_budget": kv_budget, "n_traces": len(group)}
        for name, (_, factor, _) in MEASURES.items():
            values = factor * group[name].to_numpy()
            mean |= dict(zip((name, f"{name}_low", f"{name}_high"), mean_interval(values), strict=True))
        means.append(mean)
    return pd.DataFrame(means)


def fact_figure(facts: pd.DataFrame, model: str) -> Figure:
    """Share of once-told values known when they are looked up, against the distance in tokens; a panel per KV budget.

    facts: FACT_COLUMNS, as kvlib.replay.fact_accuracy returns them, right, low and high in percent. Rows of the full
    cache are drawn in every panel. Fewer than FEWEST_LOOK_UPS look-ups make no point. Errors as in pareto_figure.
    """
    rows = required(facts, FACT_COLUMNS, "the look-ups", ["distance_low", "distance_high", "n", "right"])
    rows = rows.assign(label=rows["arm"].where(rows["kv_budget"].notna(), FULL))
    once(rows, ["label", "kv_budget", "distance_low"])
    if (rows["label"] == FULL).all():
        raise ConfigError("only the full cache was probed; replay arms with a KV budget beside it")
    counts = rows.groupby("distance_low")["n"].max()
    bins = sorted({(row.distance_low, row.distance_high) for row in rows.itertuples()})
    ticks = {low: f"{low}–{high - 1}\nn = {counts[low]}" for low, high in bins}
    drawn = rows[rows["n"] >= FEWEST_LOOK_UPS].assign(x=rows["distance_low"], y=rows["right"])
    panels = [
        Panel(f"KV budget {budget:.0f}", "Known (%)", drawn[drawn["kv_budget"].fillna(budget) == budget], 104)
        for budget in sorted(rows["kv_budget"].dropna().unique())
    ]
    notes = [
        "Teacher-forced: the model's own choice in place of a value that was told once, and not restated since. n = "
        f"look-ups; below {FEWEST_LOOK_UPS} there is no point. Whiskers: 95 % interval (Wilson).",
        *caveat_of(model),
    ]
    heading = banner("facts told once", model)
    return lines_figure(panels, heading, notes, "Distance from the told value (tokens)", ticks, below=0.75)


def fact_table(facts: pd.DataFrame) -> pd.DataFrame:
    """The numbers of fact_figure as text."""
    rows = required(facts, FACT_COLUMNS, "the look-ups", FACT_COLUMNS[2:])
    rows = rows.sort_values(["kv_budget", "distance_low", "right"], ascending=[True, True, False], kind="stable")
    return pd.DataFrame(
        {
            "KV budget": rows["kv_budget"].map(budget_text).tolist(),
            "Distance (tokens)": [f"{row.distance_low}–{row.distance_high - 1}" for row in rows.itertuples()],
            "Arm": rows["arm"].where(rows["kv_budget"].notna(), FULL).tolist(),
            "n": texts(rows["n"]),
            "Known (%) with 95 % interval": intervals(rows, ["right", "low", "high"]),
        }
    )
