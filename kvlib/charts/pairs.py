"""Every two KV budgets of a dataset compared on the same problems: one triangle per dataset, and its table."""

import pandas as pd
from matplotlib.patches import Rectangle

from kvlib.charts.rows import budget_text, signed, signed_interval, texts
from kvlib.charts.sheet import BLUE, INK, ORANGE_TEXT, banner, caveat_of, sheet, style


def pairs_figure(pairs, model):
    """Every two KV budgets of a dataset compared on the same problems and noise, one triangle per dataset.

    pairs: as kvlib.stats.budget_differences returns them. A dataset of which no budget ever solved a problem that
    another did not has nothing to compare: a sentence stands for it, and one where there is no pair at all.
    """
    datasets = list(pairs["dataset"].unique())
    told = [name for name in datasets if pairs.loc[pairs["dataset"] == name, ["wins", "losses"]].any(axis=None)]
    notes = [
        "Each square: Pass@1 at the row's KV budget minus that at the column's, in points, and the paired 95 % "
        "interval (bootstrap over problems). Bold on blue (more cache is better) or on orange (worse): the two differ "
        "by an exact sign-flip test over problems, 5 % for a dataset as a whole (Holm). Grey: these problems cannot "
        "tell them apart."
    ] * bool(told)  # fmt: skip
    notes += [f"{name}: the same problems are solved, or none, whatever the KV budget; there is nothing to compare."
              for name in datasets if name not in told]  # fmt: skip
    notes += ["There are no two KV budgets of a dataset to compare."] * pairs.empty
    side = 0.96 * max(pairs.groupby("dataset")["fewer"].nunique()) if told else 0.0
    with style():
        heading = banner("KV budgets compared pairwise", model, datasets)
        notes += caveat_of(model)
        fig, axes = sheet(heading, notes, len(told), (side, side), (0.9, 0.3, 0.45, 0.6))
        for ax, dataset in zip(axes, told, strict=True):
            _draw_triangle(ax, pairs[pairs["dataset"] == dataset], f"{model} | {dataset}")
    return fig


def _draw_triangle(ax, pairs, title):
    fewer, more = sorted(pairs["fewer"].unique()), sorted(pairs["more"].unique())
    for row in pairs.itertuples():
        x, y = fewer.index(row.fewer), more.index(row.more)
        face = "#F0F0F0" if not row.differs else BLUE if row.difference > 0 else ORANGE_TEXT
        ink, weight = ("white", "bold") if row.differs else (INK, "normal")
        ax.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=face, linewidth=0))
        ax.text(x, y - 0.13, signed(row.difference), ha="center", va="center", color=ink, size=10.5, weight=weight)
        interval = f"{signed(row.low)} to {signed(row.high)}"
        ax.text(x, y + 0.23, interval, ha="center", va="center", color=ink, size=7.2)
    n = pairs["n_problems"].iloc[0]
    ax.set_title(f"{title} (n = {n}): {pairs['differs'].sum()} of {len(pairs)} pairs differ", color=INK, fontsize=11.5)
    ax.set_xticks(range(len(fewer)), [budget_text(b) for b in fewer])
    ax.set_yticks(range(len(more)), [budget_text(b).removesuffix(" cache") for b in more])
    ax.set(xlim=(-0.5, len(fewer) - 0.5), ylim=(len(more) - 0.5, -0.5), xlabel="minus KV budget", ylabel="KV budget")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def pairs_table(pairs):
    """The numbers of pairs_figure as text, one row per pair."""
    return pd.DataFrame(
        {
            "Dataset": pairs["dataset"],
            "KV budget": pairs["more"].map(budget_text),
            "minus KV budget": pairs["fewer"].map(budget_text),
            "n": texts(pairs["n_problems"]),
            "Difference (points) with 95 % interval": [signed_interval(row) for row in pairs.itertuples()],
            "Problems won": texts(pairs["wins"]),
            "Problems lost": texts(pairs["losses"]),
            "p": [f"{p:.4f}" if p >= 0.0001 else "< 0.0001" for p in pairs["p"]],
            "Differ (5 %, Holm)": pairs["differs"].map({True: "yes", False: "no"}),
        }
    )
