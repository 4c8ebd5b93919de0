"""Measured cells of one model and policy -> bars of Pass@1 with throughput over them, and the table beneath."""

import math
import textwrap

import matplotlib.patheffects
import pandas as pd

from kvlib.charts.published import BAR_WIDTH, PAPER, draw_beside, draw_line, print_value, two_axes
from kvlib.charts.rows import alike, budget_text, intervals, once, order, place, refuse, required, samples_text, texts
from kvlib.charts.sheet import BLUE, GREY, INK, ORANGE, banner, budget_places, caveat_of, sheet, style
from kvlib.errors import ConfigError, Spoken

PASS = ["pass_at_1", "pass_low", "pass_high"]
SPEED = ["throughput", "throughput_low", "throughput_high"]
MEASURED_COLUMNS = [
    "model", "dataset", "policy", "device", "grader", "kv_budget", *PASS, "n_problems", "n_samples", "max_new_tokens",
    "mean_tokens", "truncated_share", "batch_halved",
]  # fmt: skip
ONE_TIMING = ["throughput_definition", "throughput_interval", "batch_size", "n_repeats"]
TIMED_COLUMNS = [*SPEED, *ONE_TIMING, "too_busy", "ends_differ"]

EXACT, PUBLISHED_RULES = "exact checker", "published rules"
BESIDE_NOTE = (
    "Published (DynTS, arXiv 2601.18383; hatched, dashed), not measured here: without interval, because its verdicts "
    "per problem are not published; its throughput counts forward time only, at batch size 20 on the authors' GPUs."
)

TOP = 116  # percent: leaves room above 100 for the legend


class IncompleteError(Spoken, ValueError):
    """Cells that the grid asks for have no row; the message names them and the next step."""


LONGEST_TITLE = 38
"""Characters of a panel's heading that fit on a line."""


def measured_figure(df, expected, *, allow_incomplete=False, published=()):
    """The form of the published panel for values measured here; both axes start at 0.

    df: one row per (dataset, kv_budget), of one model and policy, with the columns
        model, dataset, policy, device, grader    str
        kv_budget                                 slots; NaN or None = full cache
        pass_at_1, pass_low, pass_high            percent; the 95 % interval
        n_problems, n_samples                     problems; samples per problem
        max_new_tokens, mean_tokens               tokens per answer, at most and on average
        truncated_share                           of the answers, cut at the length limit, from 0 to 1
        batch_halved                              bool, whether the GPU's memory held half the rows only
      and, unless the study asks for no timing, when only bars are drawn,
        throughput, throughput_low, _high         tokens/s; median and interval; all NaN: not yet timed
        throughput_definition, _interval          str, the right axis label; what the interval is
        n_repeats, too_busy                       int; bool, whether the timing's control failed
        ends_differ                               bool, whether the smallest and the largest KV budget differ in speed
                                                  by their paired interval; None where none was measured
        batch_size                                rows decoded together in the timing run
    expected: list of (dataset, kv_budget) that the chart promises, in the order of the panels; None = full cache.
    allow_incomplete: draw missing cells as hatched columns under a visible mark instead of raising.
    published: what load_published returned, any model's. Where model and datasets are the same and the grading by the
        published rules, its values are drawn hatched beside the measured bars and as a dashed line.

    Raises IncompleteError naming the missing cells; ConfigError for a missing column, a NaN or impossible value (naming
    its cell), a cell that is there twice or not expected, rows of different models, policies, devices, definitions or
    sample counts.
    """
    expected = list(dict.fromkeys((dataset, _budget(budget)) for dataset, budget in expected))
    datasets = list(dict.fromkeys(dataset for dataset, _ in expected))
    budgets = sorted({budget for _, budget in expected if budget is not None})
    if not budgets:
        raise ConfigError("expected names no KV budget, so there is nothing to put on the x axis")
    rows, timed = _measured_rows(df), "throughput" in df
    if unexpected := [cell for cell in rows if cell not in expected]:
        raise ConfigError(f"not part of this grid: {_name_cells(unexpected)}; pass only the rows to be drawn")
    missing = [cell for cell in expected if cell not in rows]
    untimed = [cell for cell, row in rows.items() if timed and math.isnan(row.throughput)]
    marks = {f"{what}{len(cells)} of {len(expected)} cells missing": cells
             for what, cells in (("", missing), ("throughput of ", untimed)) if cells}  # fmt: skip
    if marks and not (allow_incomplete and rows):
        raise IncompleteError("; ".join([*(f"{count}: {_name_cells(cells)}" for count, cells in marks.items()),
                                         "run `make charts` again"]))  # fmt: skip
    one, beside = df.iloc[0], _beside(published, df, expected)
    speeds = [*(df["throughput_high"] if timed else ()), *(row.throughput_tps for row in beside.values())]
    tick = _round_up(max((speed for speed in speeds if speed > 0), default=1) / 5)
    label = textwrap.wrap(_definition(df), 30, break_on_hyphens=False) if timed else []
    what = "Pass@1 and throughput" if timed else "Pass@1"
    heading = banner(what + (", beside the published values" if beside else ""), one.model, datasets, one.policy)
    with style():
        fig, axes = sheet(
            heading, _notes(df, beside), len(datasets), (4.2 if beside else 2.75, 2.75),
            (0.72, 0.62 if timed else 0.15, 0.4, 0.6), len(datasets), 0.2 * len(label),
            [f"INCOMPLETE: {count}" for count in marks],
        )  # fmt: skip
        for ax, dataset in zip(axes, datasets, strict=True):
            here = {budget: row for (name, budget), row in rows.items() if name == dataset}
            wanted = [budget for name, budget in expected if name == dataset]
            theirs = [beside.get((dataset, budget)) for budget in budgets] if beside else []
            n = f"n = {next(iter(here.values())).n_problems}" if here else "missing"
            last = "\n".join(label * (ax is axes[-1]))
            title = f"{one.model} | {dataset} ({n})"
            title = title if len(title) <= LONGEST_TITLE else f"{dataset} ({n})"  # the banner says whose it is
            right = two_axes(ax, title, "Pass@1 (%)", last)
            right.set_ylim(0, 5 * tick * TOP / 100)
            right.set_yticks([tick * i for i in range(6)] if timed else [])
            right.spines["right"].set_visible(timed)
            handles = _draw_panel(ax, right, here, wanted, budgets, theirs, timed)
        if handles:
            right.legend(handles=handles, loc="upper right", ncols=2, frameon=False, borderaxespad=0, columnspacing=0.7,
                         handlelength=1.4, handletextpad=0.4, fontsize=9.2)  # fmt: skip
    return fig


def measured_table(df):
    """The numbers of measured_figure as text, one row per cell, full cache last in each dataset.

    df: the columns of measured_figure; of a benchmark also strict_pass_at_1 (percent) and unanswered_share (fraction
    without an answer), NaN where they do not apply.
    Raises ConfigError as measured_figure does.
    """
    _measured_rows(df)
    df = order(df)
    table = pd.DataFrame(
        {
            "Dataset": df["dataset"].tolist(),
            "KV budget": df["kv_budget"].map(budget_text).tolist(),
            "n": texts(df["n_problems"]),
            "Pass@1 (%) with 95 % interval": intervals(df, PASS),
        }
    )
    if "throughput" in df:
        repeated = df.assign(throughput_low=df["throughput_low"].where(df["n_repeats"] > 1))
        table[_definition(df)] = intervals(repeated, SPEED, "{:,.0f}", "not timed")
    table["Mean output (tokens)"] = texts(df["mean_tokens"])
    table["Truncated (%)"] = texts(100 * df["truncated_share"], "{:.1f}")
    if df["batch_halved"].any():
        table["Batch halved"] = ["yes" if halved else "" for halved in df["batch_halved"]]
    if "strict_pass_at_1" in df:  # of a benchmark; a chain has an exact checker
        table["Strict Pass@1 (%)"] = texts(df["strict_pass_at_1"], "{:.1f}", "")
        table["Without an answer (%)"] = texts(100 * df["unanswered_share"], "{:.1f}", "")
    return table


def _draw_panel(ax, right, here, wanted, budgets, theirs, timed):
    """One dataset: bars and whiskers of the rows `here` {budget: row}, throughput over them; the legend's handles."""
    places, xlabel = budget_places(budgets)
    step = places[1] - places[0] if len(places) > 1 else 1
    at = dict(zip(budgets, places, strict=True))
    if None in wanted:
        at[None] = places[-1] + 1.1 * step
    ax.set_xticks([*at.values()], ["full" if budget is None else budget for budget in at])
    ax.set_xlabel(xlabel)
    ax.set_xlim(places[0] - 0.6 * step, max(at.values()) + 0.6 * step)
    ax.set_ylim(0, TOP)
    ax.set_yticks(range(0, 101, 20))
    ax.grid(axis="y")
    aside, width = (0.21 * step, 0.4 * step) if theirs else (0, BAR_WIDTH * step)  # each of two bars, from the middle
    handles = []
    if set(wanted) <= set(here) and not theirs and not any(row.pass_at_1 for row in here.values()):
        n = next(iter(here.values())).n_problems
        most = max(row.pass_high for row in here.values())
        text = f"0 of {n} problems solved at every KV budget{' and by the full cache' if None in at else ''}"
        text = textwrap.fill(f"{text} (95 % interval: 0 to {most:.1f} %)", 34)
        ax.text(0.5, 0.2, text, transform=ax.transAxes, ha="center", va="center", bbox=PAPER)
    else:
        drawn = [(at[budget], here[budget]) for budget in budgets if budget in here]
        bars = ax.bar([x - aside for x, _ in drawn], [row.pass_at_1 for _, row in drawn], width, color=BLUE,
                      label="Pass@1 (left)")  # fmt: skip
        handles.append(bars)
        for x, row in drawn:
            if theirs:
                _draw_whisker(ax, x - (0.31 if row.pass_at_1 else 0.2) * step, row)
                print_value(ax, x - 0.2 * step, 0, row.pass_at_1, "white", rotation=90)
            else:
                # Left of the bar's middle, where the line's marker cannot hide it.
                _draw_whisker(ax, x - (0.24 if row.pass_at_1 else 0) * step, row)
                inside = min(row.pass_low, row.pass_at_1) > 9
                print_value(ax, x, 0 if inside else row.pass_high, row.pass_at_1, "white" if inside else INK)
        if None in here:
            _draw_full_cache(ax, here[None], at[None], timed and here[None].throughput / right.get_ylim()[1] * TOP)
    if theirs:
        hatched, dashed = draw_beside(ax, right, places, theirs, aside, step)
        handles.append(hatched)
    for budget in wanted:
        if budget not in here:
            _draw_missing(ax, at[budget] - aside, width, "missing" if budget else "full cache missing")
    if timed:
        handles.append(_draw_throughput(right, at, here))
    return [*handles, dashed] if theirs else handles


def _draw_throughput(right, at, here):
    """The line over the KV budgets and, hollow and unjoined, the full cache's; whiskers where there are repeats."""
    budgets = [budget for budget in at if budget is not None]
    speeds = [here[budget].throughput if budget in here else math.nan for budget in budgets]  # a gap where one misses
    line = draw_line(right, [at[budget] for budget in budgets], speeds, "Throughput (right)")
    if None in here:
        right.plot(at[None], here[None].throughput, "o", color=ORANGE, markersize=7, markerfacecolor="white", zorder=3,
                   gid="full")  # fmt: skip
    for x, row in [(x, here[budget]) for budget, x in at.items() if budget in here]:
        if row.n_repeats > 1:
            # The white edge keeps the whisker apart from a bar behind it.
            right.plot([x, x], [row.throughput_low, row.throughput_high], color=ORANGE, linewidth=1.8, zorder=1.9,
                       solid_capstyle="butt", gid="repeats",
                       path_effects=[matplotlib.patheffects.withStroke(linewidth=3, foreground="white")])  # fmt: skip
    return line


def _draw_whisker(ax, x, row):
    below, above = max(0, row.pass_at_1 - row.pass_low), max(0, row.pass_high - row.pass_at_1)
    ax.errorbar(x, row.pass_at_1, [[below], [above]], color=INK, linewidth=1.3, capsize=2.5, clip_on=False)


def _draw_missing(ax, x, bar_width, text):
    half = bar_width / 2
    ax.axvspan(x - half, x + half, facecolor="#F6F6F6", edgecolor=GREY, hatch="////", linewidth=0, gid="missing")
    ax.text(x, 50, text, rotation=90, ha="center", va="center", size=9.5, color=INK, bbox=PAPER)


def _draw_full_cache(ax, row, x, marker):
    """Dashed level across the panel; its value on the side away from the throughput's marker (its height, or False)."""
    level = row.pass_at_1
    ax.axhline(level, color=INK, linewidth=1.3, linestyle=(0, (4, 2.5)), label="full cache")
    up = level < 12 or (marker is not False and marker < level)
    ax.annotate("100" if level == 100 else f"{level:.1f}", (x, level), (0, 3 if up else -3),
                textcoords="offset points", ha="center", va="bottom" if up else "top", size=9)  # fmt: skip


def _notes(df, beside):
    """What the figure cannot say, as sentences under it."""
    one, timed = df.iloc[0], "throughput" in df
    interval = "Wilson" if one.n_samples == 1 else "bootstrap over problems"
    samples = samples_text([one.n_samples])
    speed = "Throughput was not measured: the study asks for no timing."
    if timed and df["throughput"].notna().any():
        here = df[df["throughput"].notna()].iloc[0]
        repeats = f"{here.n_repeats:.0f} rounds; orange whiskers: {here.throughput_interval}"
        repeats = repeats if here.n_repeats > 1 else "one round, so without an interval"
        speed = f"Throughput at batch size {here.batch_size:.0f}: {repeats}"
        speed += "; hollow: the full cache." if df["kv_budget"].isna().any() else "."
    elif timed:
        speed = "Throughput is not measured yet."
    halved, noisy = df[df["batch_halved"].astype(bool)], _noisy(df) if timed else []
    halved = [*zip(halved["dataset"], halved["kv_budget"], strict=True)]
    graders = df["grader"].unique()
    return [
        f"Measured on {one.device}. Policy {one.policy}, {samples}, at most {one.max_new_tokens} new tokens, n = "
        f"problems; black whiskers: 95 % interval ({interval}); dashed: the full cache. {speed}",
        *([] if [*graders] == [EXACT] else [f"Graded by the {' and the '.join(graders)}."]),
        *([BESIDE_NOTE] if beside else []),
        *([f"Ran out of GPU memory and were decoded with half the rows, whose sums round differently: "
           f"{_name_cells(halved)}."] if halved else []),
        *([f"On {', '.join(noisy)} the timing is too noisy to call any KV budget faster than another."] * bool(noisy)),
        *caveat_of(one.model),
    ]  # fmt: skip


def _noisy(df):
    """The datasets whose line means nothing: equal work ran at different speeds, or its ends are not told apart."""
    found = []
    for dataset, line in df.dropna(subset=["kv_budget", "throughput"]).groupby("dataset", sort=False):
        spread = (line["throughput_high"] - line["throughput_low"]).max()
        differ = line["ends_differ"].iloc[0]
        if pd.isna(differ):  # older records have no pairs
            differ = len(line) == 1 or spread <= line["throughput"].max() - line["throughput"].min()
        if line["too_busy"].iloc[0] or not differ:
            found.append(dataset)
    return found


def _definition(df):
    return next(iter(df["throughput_definition"].dropna()), "Throughput (tokens/s)")


def _budget(value):
    return None if pd.isna(value) else int(value)


def _name_cells(cells, most=8):
    names = [place({"dataset": dataset, "kv_budget": budget}) for dataset, budget in cells]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _measured_rows(df):
    """{(dataset, budget or None): row}, checked so that whatever is drawn can be trusted."""
    if df.empty:
        return {}
    timed = "throughput" in df
    numbers = ["mean_tokens", "truncated_share", *PASS, *SPEED * timed]
    required(df, [*MEASURED_COLUMNS, *TIMED_COLUMNS * timed], "the measured rows", numbers[:2])
    known = df.dropna(subset=SPEED, how="all") if timed else df
    alike(df, ["model", "policy", "n_samples", "max_new_tokens"])
    alike(known, ["device", *ONE_TIMING * timed])
    for dataset, group in df.groupby("dataset"):
        if group["n_problems"].nunique(dropna=False) > 1:
            raise ConfigError(f"{dataset} has cells of different n_problems; its bars cannot be compared")
    once(df, ["dataset", "kv_budget"])
    for rows, (name, low, high) in [(df, PASS), (known, SPEED)][: 1 + (timed and len(known) > 0)]:
        required(rows, [], "the measured rows", [name, low, high])
        # A rounding error of the interval's formula is not a fault.
        within = (rows[low] - 1e-6 <= rows[name]) & (rows[name] <= rows[high] + 1e-6)
        refuse(rows[~within], name, f"outside its interval {low} to {high}")
    for name in numbers:
        refuse(df[df[name] < 0], name, "it cannot be below 0")
    for name, most in [("pass_high", 100 + 1e-6), ("truncated_share", 1)]:
        refuse(df[df[name] > most], name, f"it cannot be above {most:.0f}")
    return {(row.dataset, _budget(row.kv_budget)): row for row in df.itertuples(index=False)}


def _beside(references, df, expected):
    """{(dataset, budget): row} of the published values of the same model, where all is graded by the published rules"""
    theirs = [row for reference in references for row in reference.itertuples(index=False)]
    return {(row.dataset, row.kv_budget): row for row in theirs
            if (df["model"] == row.model).all() and (df["grader"] == PUBLISHED_RULES).all()
            and (row.dataset, row.kv_budget) in expected}  # fmt: skip


def _round_up(value):
    """The next number that makes readable ticks."""
    if value <= 0:
        return 1
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * m for m in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * m >= value * (1 - 1e-9))
