"""The charts of many arms, drawn from made-up numbers: what they refuse, what they name, and that nothing overlaps."""

import itertools
import math

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from kvlib.charts import arms as cf
from kvlib.charts.measured import GREY, INK, save
from kvlib.errors import ConfigError

ARMS = ["Random", "Recency", "StreamingLLM", "H2O", "TOVA", "SnapKV", "R-KV", "KeyDiff", "VaSE", "G-KV", "TriAttention"]
BUDGETS = [48, 64, 80, 96]


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    rows = []
    for dataset in ("Chain-A", "Chain-B", "Chain-C"):
        for i, arm in enumerate(ARMS):
            for budget in BUDGETS:
                rate = min(100.0, budget / 2 + 3 * i + rng.uniform(0, 3))
                rows.append((dataset, arm, budget, True, rate, rate - 5, min(100, rate + 4), 300 - budget, 0.3, 50 + i))
        rows.append((dataset, "full", None, False, 97.0, 94.0, 99.0, 170.0, 0.0, math.nan))
    columns = ["dataset", "arm", "kv_budget", "protected", "pass_at_1", "pass_low", "pass_high", "mean_tokens"]
    frame = pd.DataFrame(rows, columns=[*columns, "truncated_share", "round_us_per_row"])
    frame["kib_per_row"] = 2.0 * frame["kv_budget"].fillna(400) + 10 * frame["round_us_per_row"].fillna(0)
    return frame.assign(model="Tiny-0.8M", n_problems=200, n_samples=4, mean_live_slots=60.0, seconds_per_solved=0.1234)


@pytest.fixture(scope="module")
def differences():
    rng = np.random.default_rng(1)
    middle = rng.normal(0, 4, len(ARMS))
    return pd.DataFrame({"arm": [f"{arm}+prompt" for arm in ARMS], "difference": middle, "low": middle - 2,
                         "high": middle + 2.5, "wins": 31, "losses": 20, "n_problems": 600})  # fmt: skip


@pytest.fixture(scope="module")
def fidelity():
    rows = [(f"{arm}+prompt", b, 20, 0.5 + b / 200 - i / 100, 0.4 - b / 300 + i / 100)
            for i, arm in enumerate(ARMS) for b in (32, 64, 96)]  # fmt: skip
    return pd.DataFrame([*rows, ("full", None, 20, 1.0, 0.0)], columns=cf.FIDELITY_COLUMNS)


@pytest.fixture(scope="module")
def facts():
    rows = [(arm, b, low, 2 * low, 40, 90 - low / 2 - i, 80 - low / 2 - i, 95 - low / 2)
            for i, arm in enumerate(ARMS) for b in (48, 96) for low in (8, 16, 32, 64)]  # fmt: skip
    full = [("full", None, low, 2 * low, 40, 100.0, 91.2, 100.0) for low in (8, 16, 32, 64)]
    return pd.DataFrame([*rows, *full], columns=cf.FACT_COLUMNS)


@pytest.fixture(scope="module")
def figures(cells, differences, fidelity, facts):
    return {
        "pareto": cf.pareto_figure(cells),
        "length": cf.length_figure(cells),
        "difference": cf.difference_figure(differences, "Random+prompt"),
        "fidelity": cf.fidelity_figure(fidelity, "Tiny-0.8M"),
        "fact": cf.fact_figure(facts, "Tiny-0.8M"),
    }


def texts(fig):
    fig.draw_without_rendering()
    return {id(t): t for t in fig.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible()}.values()


def line_ends(ax):
    return [t for t in ax.texts if t.get_gid() == "line-end"]


def data_lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def test_no_words_overlap_or_leave_the_page(figures):
    for name, fig in figures.items():
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts(fig)]
        assert [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)] == [], name
        outside = [a for a, x in boxes if x.x0 < 0 or x.y0 < 0 or x.x1 > fig.bbox.x1 or x.y1 > fig.bbox.y1]
        assert outside == [], name


def test_labels_of_lines_that_end_together_stand_apart_in_the_order_of_the_ends(cells):
    together = cells.assign(pass_at_1=cells["pass_at_1"].where(cells["kv_budget"] != 96, 50 + cells.index % 11 / 1000))
    fig = cf.pareto_figure(together)
    texts(fig)
    for ax in fig.axes:
        labels = sorted(line_ends(ax), key=lambda t: t.get_window_extent().y0)
        boxes = [t.get_window_extent() for t in labels]
        assert len(labels) == len(ARMS) + 1
        assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
        ends = [data_lines(ax)[t.get_text()].get_ydata()[-1] for t in labels]
        assert ends == sorted(ends)


def test_every_arm_is_a_line_with_its_numbers_and_its_own_look(figures, cells):
    axes = figures["pareto"].axes
    assert [ax.get_title() for ax in axes] == [f"Tiny-0.8M | Chain-{x} (n = 200)" for x in "ABC"]
    for ax, dataset in zip(axes, ("Chain-A", "Chain-B", "Chain-C"), strict=True):
        lines = data_lines(ax)
        assert set(lines) == {*(f"{arm}+prompt" for arm in ARMS), cf.FULL}
        here = cells[(cells["dataset"] == dataset) & (cells["arm"] == "TOVA")]
        assert list(lines["TOVA+prompt"].get_ydata()) == here["pass_at_1"].tolist()
        assert list(lines["TOVA+prompt"].get_xdata()) == BUDGETS
        assert set(lines[cf.FULL].get_ydata()) == {97.0} and lines[cf.FULL].get_color() == INK
        looks = {(to_hex(line.get_color()), line.get_marker(), line.get_linestyle()) for line in lines.values()}
        assert len(looks) == len(lines)
        for null in ("Random+prompt", "Recency+prompt"):
            assert lines[null].get_color() == GREY and lines[null].get_linestyle() == "--"


def test_length_has_tokens_and_truncated_share_of_each_dataset(figures):
    axes = figures["length"].axes
    assert [ax.get_ylabel() for ax in axes] == ["Mean output (tokens)", "Truncated (%)"] * 3
    assert list(data_lines(axes[0])["H2O+prompt"].get_ydata()) == [300 - b for b in BUDGETS]
    assert set(data_lines(axes[1])["H2O+prompt"].get_ydata()) == {30.0}


def test_protected_and_unprotected_are_two_arms(cells):
    both = pd.concat([cells, cells[(cells["arm"] == "H2O")].assign(protected=False)])
    assert {"H2O", "H2O+prompt"} <= set(data_lines(cf.pareto_figure(both).axes[0]))


def test_uneven_budgets_get_equal_steps_and_the_axis_says_so(figures):
    ax = figures["fidelity"].axes[0]
    assert ax.get_xlabel() == "KV Budget"
    uneven = pd.DataFrame({"arm": "A", "kv_budget": [32, 64, 256], "n_traces": 3, "recall": 0.5, "error": 0.1})
    ax = cf.fidelity_figure(uneven, "m").axes[0]
    assert ax.get_xlabel() == "KV Budget (not to scale)" and list(ax.get_xticks()) == [0, 1, 2]


def test_differences_are_sorted_and_filled_where_the_interval_excludes_zero(figures, differences):
    (ax,) = figures["difference"].axes
    points = [line for line in ax.lines if line.get_marker() == "o"]
    ranked = differences.sort_values("difference")
    assert [line.get_xdata()[0] for line in points] == ranked["difference"].tolist()
    assert [t.get_text() for t in ax.get_yticklabels()] == ranked["arm"].tolist()
    for line, row in zip(points, ranked.itertuples(), strict=True):
        assert (to_hex(line.get_markerfacecolor()) == "#ffffff") == (row.low <= 0 <= row.high)
    assert cf.difference_table(differences)["Arm"].tolist() == ranked["arm"].tolist()[::-1]


def test_fact_panels_are_budgets_and_the_full_cache_is_in_each(figures):
    axes = figures["fact"].axes
    assert [ax.get_title() for ax in axes] == ["KV budget 48", "KV budget 96"]
    for ax in axes:
        assert list(data_lines(ax)[cf.FULL].get_ydata()) == [100.0] * 4
        assert ax.get_xticklabels()[1].get_text() == "16–31\nn = 40"


def test_tables_hold_the_numbers_of_the_charts(cells, fidelity, facts):
    table = cf.cells_table(cells)
    assert len(table) == len(cells) and table["KV budget"].tolist()[len(ARMS) * 4] == cf.FULL
    full = table[table["Arm"] == cf.FULL].iloc[0]
    assert full["Pass@1 (%) with 95 % interval"] == "97.0 (94.0 to 99.0)" and full["Round (µs per row)"] == "–"
    assert full["Seconds per solved problem"] == "0.123"
    assert len(cf.fidelity_table(fidelity)) == len(fidelity)
    assert cf.fact_table(facts).iloc[0].to_dict() == {
        "KV budget": "48",
        "Distance (tokens)": "8–15",
        "Arm": "Random",
        "n": "40",
        "Known (%) with 95 % interval": "86.0 (76.0 to 91.0)",
    }


@pytest.mark.parametrize("column", cf.CELL_COLUMNS)
def test_a_missing_column_is_refused_by_name(column, cells):
    for draw in (cf.pareto_figure, cf.length_figure, cf.cells_table):
        with pytest.raises(ConfigError, match=f"the cells lack column {column}; pass one row per point"):
            draw(cells.drop(columns=column))


def test_what_the_other_charts_lack_is_refused_by_name(differences, fidelity, facts):
    for draw, frame, column in [
        (lambda df: cf.difference_figure(df, "x"), differences, "wins"),
        (cf.difference_table, differences, "low"),
        (lambda df: cf.fidelity_figure(df, "m"), fidelity, "recall"),
        (cf.fidelity_table, fidelity, "error"),
        (lambda df: cf.fact_figure(df, "m"), facts, "right"),
        (cf.fact_table, facts, "n"),
    ]:
        with pytest.raises(ConfigError, match=f"lack column {column}; "):
            draw(frame.drop(columns=column))
        with pytest.raises(ConfigError, match="lack rows; "):
            draw(frame.iloc[:0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda df: pd.concat([df, df.iloc[[4]]]), r"Chain-A, Recency\+prompt, 48.* is there twice"),
        (lambda df: df.assign(model=["Other"] + ["Tiny"] * (len(df) - 1)), "one model per chart, got Other, Tiny"),
        (lambda df: df.assign(pass_at_1=df["pass_at_1"].where(df.index != 4)), "pass_at_1 of Chain-A, Recency, 48"),
        (lambda df: df[df["kv_budget"].isna()], "no cell has a KV budget"),
    ],
    ids=["twice", "models", "nan", "full only"],
)
def test_cells_that_do_not_belong_on_one_chart_are_refused(change, message, cells):
    with pytest.raises(ConfigError, match=message):
        cf.pareto_figure(change(cells))


def test_more_arms_than_can_be_told_apart_are_refused(cells):
    one = cells[cells["arm"] == "H2O"]
    many = pd.concat([one.assign(arm=f"arm {i}") for i in range(cf.MOST_ARMS + 1)])
    with pytest.raises(ConfigError, match=f"{cf.MOST_ARMS + 1} arms are more than the {cf.MOST_ARMS}"):
        cf.pareto_figure(many)
    looks = cf._styles([f"arm {i}" for i in range(cf.MOST_ARMS)], cf.NULLS).values()
    assert len({(look["color"], look["marker"], str(look["linestyle"])) for look in looks}) == cf.MOST_ARMS


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-5, 15), min_size=1, max_size=12))
def test_spread_keeps_order_gap_and_range_and_moves_nothing_without_need(wanted):
    places = cf.spread(wanted, 0.5, 0.0, 10.0)
    ranked = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    assert all(places[b] - places[a] >= 0.5 - 1e-9 for a, b in itertools.pairwise(ranked))
    assert min(places) >= -1e-9 and max(places) <= 10 + 1e-9
    apart = [4.0 * i / 3 for i in range(len(wanted))]
    assert cf.spread(apart, 0.5, 0.0, 20.0) == pytest.approx(apart)
    with pytest.raises(ConfigError, match="do not fit on one axis"):
        cf.spread([1.0] * 30, 0.5, 0.0, 10.0)


def test_a_chart_is_saved_as_any_other(figures, tmp_path):
    first = [path.read_bytes() for path in save(figures["pareto"], tmp_path / "pareto")]
    assert [path.read_bytes() for path in save(figures["pareto"], tmp_path / "again" / "pareto")] == first


def test_against_memory_each_arm_stands_where_its_own_cache_does(cells):
    fig = cf.memory_figure(cells)
    for ax, (_, here) in zip(fig.axes, cells.dropna(subset="kv_budget").groupby("dataset", sort=False), strict=True):
        for arm, its in here.groupby("arm"):
            (line,) = [line for line in ax.lines if line.get_label() == f"{arm}+prompt"]
            assert sorted(line.get_xdata()) == sorted(its["kib_per_row"])
            assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == dict(
                zip(its["kib_per_row"], its["pass_at_1"], strict=True)
            )
