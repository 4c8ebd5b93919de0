"""Charts of many arms and of replays, from made-up numbers: what they refuse and name, and that nothing overlaps."""

import itertools
import math

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from kvlib.charts import arms as cf
from kvlib.charts import replays as rp
from kvlib.charts.sheet import FULL, GREY, INK, POLICIES, looks, save
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
    return frame.assign(
        model="Tiny-0.8M",
        n_problems=200,
        n_samples=4,
        max_new_tokens=512,
        mean_live_slots=60.0,
        seconds_per_solved=0.1234,
    )


@pytest.fixture(scope="module")
def differences():
    rng = np.random.default_rng(1)
    middle = rng.normal(0, 4, len(ARMS))
    return pd.DataFrame({"arm": [f"{arm}+prompt" for arm in ARMS], "difference": middle, "low": middle - 2,
                         "high": middle + 2.5, "wins": 31, "losses": 20, "n_problems": 600})  # fmt: skip


@pytest.fixture(scope="module")
def fidelity():
    rows = [(f"{arm}+prompt", b, trace, 0.5 + b / 200 - i / 100 + trace / 500, 0.4 - b / 300 + i / 100 + trace / 500,
             0.9, 0.02 + trace / 1000)
            for i, arm in enumerate(ARMS) for b in (32, 64, 96) for trace in range(5)]  # fmt: skip
    return pd.DataFrame([*rows, ("full", None, 0, 1.0, 0.0, 1.0, 0.0)], columns=rp.FIDELITY_COLUMNS)


@pytest.fixture(scope="module")
def facts():
    rows = [(arm, b, low, 2 * low, 40, 90 - low / 2 - i, 80 - low / 2 - i, 95 - low / 2)
            for i, arm in enumerate(ARMS) for b in (48, 96) for low in (8, 16, 32, 64)]  # fmt: skip
    full = [("full", None, low, 2 * low, 40, 100.0, 91.2, 100.0) for low in (8, 16, 32, 64)]
    return pd.DataFrame([*rows, *full], columns=rp.FACT_COLUMNS)


@pytest.fixture(scope="module")
def figures(cells, differences, fidelity, facts):
    return {
        "pareto": cf.pareto_figure(cells),
        "length": cf.length_figure(cells),
        "memory": cf.memory_figure(cells),
        "difference": cf.difference_figure(differences, "Random+prompt", "Tiny-0.8M", ["Chain-A", "Chain-B"]),
        "fidelity": rp.fidelity_figure(fidelity, "Tiny-0.8M", ["Chain-A"]),
        "fact": rp.fact_figure(facts, "Tiny-0.8M"),
    }


def texts(fig):
    fig.draw_without_rendering()
    return {id(t): t for t in fig.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible()}.values()


def data_lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def test_no_words_overlap_or_leave_the_page(figures):
    for name, fig in figures.items():
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts(fig)]
        assert [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)] == [], name
        outside = [a for a, x in boxes if x.x0 < 0 or x.y0 < 0 or x.x1 > fig.bbox.x1 or x.y1 > fig.bbox.y1]
        assert outside == [], name


def test_every_banner_names_the_model_the_datasets_and_that_it_was_measured(figures):
    for name, fig in figures.items():
        heading = fig.texts[0].get_text().replace("\n", " ")
        assert heading.startswith("Measured here: Tiny-0.8M"), name
        assert "Chain-A" in heading or name == "fact"


def test_one_legend_names_every_arm_in_the_order_of_the_first_panel(figures, cells):
    names = [t.get_text() for t in figures["pareto"].legends[0].get_texts()]
    first = cells[(cells["dataset"] == "Chain-A") & (cells["arm"] != "full")].groupby("arm")["pass_at_1"].mean()
    assert names == [FULL, *(f"{arm}+prompt" for arm in first.sort_values(ascending=False).index)]


def test_a_policy_has_one_colour_and_marker_wherever_it_is_drawn(figures):
    def look(line):
        return line.get_color(), line.get_marker()

    drawn = {name: data_lines(fig.axes[0]) for name, fig in figures.items()}
    for arm in ("H2O+prompt", "SnapKV+prompt", "Random+prompt"):
        assert len({look(drawn[name][arm]) for name in ("pareto", "length", "memory", "fidelity")}) == 1
    assert look(drawn["fact"]["H2O"]) == look(drawn["pareto"]["H2O+prompt"])
    every = looks(POLICIES).values()
    assert len({(one["color"], one["marker"]) for one in every}) == len(POLICIES)
    (title, name) = looks(["StreamingLLM+prompt", "streaming"]).values()
    assert (title["color"], title["marker"]) == (name["color"], name["marker"])
    mine = looks(["peak+prompt", "other"]).values()
    assert {one["color"] for one in mine} == {INK} and len({one["marker"] for one in mine}) == 2


def test_every_arm_is_a_line_with_its_numbers_and_its_own_look(figures, cells):
    axes = figures["pareto"].axes
    assert [ax.get_title() for ax in axes] == [f"Tiny-0.8M | Chain-{x} (n = 200)" for x in "ABC"]
    for ax, dataset in zip(axes, ("Chain-A", "Chain-B", "Chain-C"), strict=True):
        lines = data_lines(ax)
        assert set(lines) == {*(f"{arm}+prompt" for arm in ARMS), FULL}
        here = cells[(cells["dataset"] == dataset) & (cells["arm"] == "TOVA")]
        assert list(lines["TOVA+prompt"].get_ydata()) == here["pass_at_1"].tolist()
        assert np.rint(lines["TOVA+prompt"].get_xdata()).tolist() == [0, 1, 2, 3]
        assert [t.get_text() for t in ax.get_xticklabels()] == [str(budget) for budget in BUDGETS]
        spans = [path.vertices[:, 1].tolist() for spans in ax.collections for path in spans.get_paths()]
        assert all([row.pass_low, row.pass_high] in spans for row in here.itertuples())
        assert set(lines[FULL].get_ydata()) == {97.0} and lines[FULL].get_color() == INK
        looks = {(to_hex(line.get_color()), line.get_marker(), line.get_linestyle()) for line in lines.values()}
        assert len(looks) == len(lines)
        for null in ("Random+prompt", "Recency+prompt"):
            assert lines[null].get_color() == GREY and lines[null].get_linestyle() == "--"


def test_length_has_tokens_and_truncated_share_of_each_dataset(figures):
    axes = figures["length"].axes
    assert [ax.get_ylabel() for ax in axes] == ["Mean output (tokens)", "Truncated (%)"] * 3
    assert list(data_lines(axes[0])["H2O+prompt"].get_ydata()) == [300 - b for b in BUDGETS]
    assert set(data_lines(axes[1])["H2O+prompt"].get_ydata()) == {30.0}
    assert list(data_lines(axes[0])["limit: 512 tokens"].get_ydata()) == [512, 512]


def test_protected_and_unprotected_are_two_arms(cells):
    both = pd.concat([cells, cells[(cells["arm"] == "H2O")].assign(protected=False)])
    lines = data_lines(cf.pareto_figure(both).axes[0])
    assert lines["H2O"].get_linestyle() == "--" and lines["H2O+prompt"].get_linestyle() == "-"


def test_an_arm_on_fewer_problems_says_how_many_in_its_name(cells):
    few = cells.assign(n_problems=cells["n_problems"].where(cells["arm"] != "TOVA", 20))
    fig = cf.pareto_figure(few)
    assert fig.axes[0].get_title().endswith("(n = 200)")
    assert {"TOVA+prompt (n = 20)", "H2O+prompt"} <= set(data_lines(fig.axes[0]))
    look = data_lines(fig.axes[0])["TOVA+prompt (n = 20)"]
    assert look.get_color() == data_lines(cf.pareto_figure(cells).axes[0])["TOVA+prompt"].get_color()


def test_uneven_budgets_get_equal_steps_and_the_axis_says_so(figures):
    ax = figures["fidelity"].axes[0]
    assert ax.get_xlabel() == "KV Budget"
    uneven = pd.DataFrame({"arm": "A", "kv_budget": [32, 64, 256], "trace": 0, "recall": 0.5, "error": 0.1,
                           "agreement": 0.9, "divergence": 0.1})  # fmt: skip
    ax = rp.fidelity_figure(uneven, "m").axes[0]
    assert ax.get_xlabel() == "KV Budget (not to scale)" and list(ax.get_xticks()) == [0, 1, 2]


def test_differences_are_sorted_and_filled_where_the_interval_excludes_zero(figures, differences):
    (ax,) = figures["difference"].axes
    points = [line for line in ax.lines if line.get_marker() != "None"]
    ranked = differences.sort_values("difference")
    assert [line.get_xdata()[0] for line in points] == ranked["difference"].tolist()
    assert [t.get_text() for t in ax.get_yticklabels()] == ranked["arm"].tolist()
    for line, row in zip(points, ranked.itertuples(), strict=True):
        assert (to_hex(line.get_markerfacecolor()) == "#ffffff") == (row.low <= 0 <= row.high)
    assert cf.difference_table(differences)["Arm"].tolist() == ranked["arm"].tolist()[::-1]


def test_replays_show_what_is_lost_with_its_interval_over_traces(figures, fidelity):
    lost, moved = figures["fidelity"].axes
    mean = fidelity[(fidelity["arm"] == "H2O+prompt")].groupby("kv_budget")["recall"].mean()
    assert list(data_lines(lost)["H2O+prompt"].get_ydata()) == pytest.approx([100 - 100 * recall for recall in mean])
    assert lost.get_ylim()[1] < 60, "the axis ends where the data do"
    assert len(lost.collections) == len(moved.collections) == len(ARMS)
    table = rp.fidelity_table(fidelity)
    row = table[(table["Arm"] == "H2O+prompt") & (table["KV budget"] == "32")].iloc[0]
    assert row["Traces"] == "5" and row["Attention-mass recall (%) with 95 % interval"].startswith("63.4 (63.2 to 63.6")
    assert row["Same likeliest token (%) with 95 % interval"] == "90.0 (90.0 to 90.0)"
    assert row["KL of the next token (nats) with 95 % interval"].startswith("0.022 (0.021 to 0.02")
    assert table.iloc[-1]["Attention-mass recall (%) with 95 % interval"] == "100.0", "one trace has no interval"


def test_fact_panels_are_budgets_and_the_full_cache_is_in_each(figures):
    axes = figures["fact"].axes
    assert [ax.get_title() for ax in axes] == ["KV budget 48", "KV budget 96"]
    for ax in axes:
        assert list(data_lines(ax)[FULL].get_ydata()) == [100.0] * 4
        assert ax.get_xticklabels()[1].get_text() == "16–31\nn = 40"


def test_fewer_than_ten_look_ups_make_no_point_but_a_row(facts):
    few = facts.assign(n=facts["n"].where(facts["distance_low"] != 64, 9))
    for ax in rp.fact_figure(few, "Tiny-0.8M").axes:
        assert {len(line.get_ydata()) for line in data_lines(ax).values()} == {3}
        assert ax.get_xticklabels()[3].get_text() == "64–127\nn = 9"
    assert len(rp.fact_table(few)) == len(facts)


def test_tables_hold_the_numbers_of_the_charts(cells, fidelity, facts):
    table = cf.cells_table(cells)
    assert len(table) == len(cells) and table["KV budget"].tolist()[len(ARMS) * 4] == FULL
    full = table[table["Arm"] == FULL].iloc[0]
    assert full["Pass@1 (%) with 95 % interval"] == "97.0 (94.0 to 99.0)" and full["Round (µs per row)"] == "–"
    assert full["Seconds per solved problem"] == "0.123"
    assert len(rp.fidelity_table(fidelity)) == 3 * len(ARMS) + 1
    assert rp.fact_table(facts).iloc[0].to_dict() == {
        "KV budget": "48",
        "Distance (tokens)": "8–15",
        "Arm": "Random",
        "n": "40",
        "Known (%) with 95 % interval": "86.0 (76.0 to 91.0)",
    }


@pytest.mark.parametrize("column", cf.CELL_COLUMNS)
def test_a_missing_column_is_refused_by_name(column, cells):
    for draw in (cf.pareto_figure, cf.length_figure, cf.cells_table):
        with pytest.raises(ConfigError, match=f"the cells lack column {column}; pass rows with"):
            draw(cells.drop(columns=column))


def test_what_the_other_charts_lack_is_refused_by_name(differences, fidelity, facts):
    for draw, frame, column in [
        (lambda df: cf.difference_figure(df, "x", "m"), differences, "wins"),
        (cf.difference_table, differences, "low"),
        (lambda df: rp.fidelity_figure(df, "m"), fidelity, "recall"),
        (rp.fidelity_table, fidelity, "error"),
        (lambda df: rp.fact_figure(df, "m"), facts, "right"),
        (rp.fact_table, facts, "n"),
    ]:
        with pytest.raises(ConfigError, match=f"lack column {column}; "):
            draw(frame.drop(columns=column))
        with pytest.raises(ConfigError, match="lack rows; "):
            draw(frame.iloc[:0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda df: pd.concat([df, df.iloc[[4]]]), r"Chain-A, Recency\+prompt at KV budget 48 is there twice"),
        (lambda df: df.assign(model=["Other"] + ["Tiny"] * (len(df) - 1)), "one model per chart, got Other, Tiny"),
        (
            lambda df: df.assign(pass_at_1=df["pass_at_1"].where(df.index != 4)),
            "pass_at_1 of Chain-A, Recency at KV budget 48",
        ),
        (lambda df: df[df["kv_budget"].isna()], "no cell has a KV budget"),
    ],
    ids=["twice", "models", "nan", "full only"],
)
def test_cells_that_do_not_belong_on_one_chart_are_refused(change, message, cells):
    with pytest.raises(ConfigError, match=message):
        cf.pareto_figure(change(cells))


def test_a_chart_is_saved_as_any_other(figures, tmp_path):
    first = [path.read_bytes() for path in save(figures["pareto"], tmp_path / "pareto")]
    assert [path.read_bytes() for path in save(figures["pareto"], tmp_path / "again" / "pareto")] == first


def test_differences_can_have_the_memory_beside_them(cells, differences):
    table = cf.difference_table(differences, cells)
    tova = cells[cells["arm"] == "TOVA"]["kib_per_row"].mean()
    assert table.set_index("Arm")["Mean cache (KiB per row)"]["TOVA+prompt"] == f"{tova:.0f}"


def test_against_memory_each_arm_stands_where_its_own_cache_does(cells):
    fig = cf.memory_figure(cells)
    for ax, (_, here) in zip(fig.axes, cells.dropna(subset="kv_budget").groupby("dataset", sort=False), strict=True):
        for arm, its in here.groupby("arm"):
            (line,) = [line for line in ax.lines if line.get_label() == f"{arm}+prompt"]
            assert sorted(line.get_xdata()) == sorted(its["kib_per_row"])
            assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == dict(
                zip(its["kib_per_row"], its["pass_at_1"], strict=True)
            )
        assert [line.get_ydata()[0] for line in ax.lines if line.get_label() == FULL] == [97.0]
    assert "The full cache, a level, takes 800 KiB a row" in " ".join(
        t.get_text().replace("\n", " ") for t in fig.texts
    )


def test_a_correlation_is_of_ranks_and_by_budget(cells, fidelity):
    """More attention lost with every arm, and more solved: the recall falls as Pass@1 rises."""
    here = cells[(cells["dataset"] == "Chain-A") & cells["kv_budget"].isin([64, 96])].assign(
        pass_at_1=lambda df: df["round_us_per_row"]
    )
    lost = fidelity[fidelity["kv_budget"].isin([64, 96])].assign(arm=lambda df: df["arm"].str.removesuffix("+prompt"))
    table = rp.correlation_table(lost, here)
    assert list(table.columns) == ["Measure", "KV budget 64 (11 arms)", "KV budget 96 (11 arms)"]
    by_measure = table.set_index("Measure").iloc[:, 0]
    assert by_measure["Attention-mass recall (%)"] == "-1.00" and by_measure["Output error (%)"] == "+1.00"
    beside = rp.fidelity_table(lost, here).iloc[0]
    assert beside["Arm"] == "Random" and beside["Pass@1 (%) with 95 % interval"].startswith("50.0 (")


def test_a_paired_divergence_is_taken_trace_by_trace():
    """Traces differ tenfold, arms by a tenth of each: unpaired, nothing could be told."""
    rows = [
        {
            "arm": arm,
            "kv_budget": 64,
            "trace": trace,
            "recall": 1,
            "error": 0,
            "agreement": 1,
            "divergence": trace + less,
        }
        for arm, less in (("base", 0.0), ("near", -0.25), ("far", 0.5))
        for trace in range(1, 11)
    ]
    table = rp.divergence_table(pd.DataFrame(rows), "base")
    assert table.values.tolist() == [["near", "−0.250 (−0.250 to −0.250)"], ["far", "+0.500 (+0.500 to +0.500)"]]
    with pytest.raises(ConfigError, match="none of the arms"):
        rp.divergence_table(pd.DataFrame(rows), "absent")


def test_rankings_hold_the_arms_that_all_have_with_their_places(differences):
    other = differences.assign(difference=-differences["difference"]).iloc[1:]
    table = cf.rankings_table({"one": differences, "other": other})
    assert set(table["Arm"]) == set(other["arm"]) and table["one: place"].tolist() == list(range(1, len(other) + 1))
    assert table["other: place"].tolist() == list(range(len(other), 0, -1))
