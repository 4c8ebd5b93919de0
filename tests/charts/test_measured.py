"""Every chart is drawn here from numbers made up on the spot; nothing is written under results/."""

import csv
import itertools
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.text
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from kvlib.charts.measured import (
    BESIDE_NOTE,
    EXACT,
    PASS,
    PUBLISHED_RULES,
    SPEED,
    TIMED_COLUMNS,
    IncompleteError,
    measured_figure,
    measured_table,
)
from kvlib.charts.pairs import pairs_figure, pairs_table
from kvlib.charts.published import load_published, published_figure, published_table
from kvlib.charts.sheet import TINY_CAVEAT, save
from kvlib.errors import ConfigError
from kvlib.stats import budget_differences

PUBLISHED = Path(__file__).parents[2] / "results" / "published"
QWEN, LLAMA = PUBLISHED / "r1-qwen.csv", PUBLISHED / "r1-llama.csv"
BUDGETS = [48, 64, 80, 96, 112, 128]
DATASETS = ["Chain-A", "Chain-B", "Chain-C", "Chain-D"]
EXPECTED = [(dataset, budget) for dataset in DATASETS for budget in [*BUDGETS, None]]
HOSTILE = {"figure.autolayout": True, "savefig.bbox": "tight", "savefig.pad_inches": 3, "figure.dpi": 30}
DEFINITION = "Throughput (tokens/s, all-inclusive steps)"


@pytest.fixture
def published():
    return load_published(QWEN)


@pytest.fixture
def measured():
    df = pd.DataFrame(EXPECTED, columns=["dataset", "kv_budget"])
    panel, column = df.index // 7, df.index % 7
    level = (3.0 + 95.0 * column / 6 - 2 * panel).to_series(df.index)
    speed = 1200.0 - 4 * df["kv_budget"].fillna(190) - 60 * panel
    return df.assign(
        model="Tiny-0.8M",
        policy="DynTS",
        pass_at_1=level.clip(0),
        pass_low=(level - 5).clip(0),
        pass_high=(level.clip(0) + 4).clip(upper=100),
        n_problems=200,
        n_samples=1,
        throughput=speed,
        throughput_low=speed - 30,
        throughput_high=speed + 20,
        throughput_definition=DEFINITION,
        batch_size=20,
        n_repeats=5,
        too_busy=False,
        ends_differ=None,
        throughput_interval="lowest to highest",
        max_new_tokens=640,
        mean_tokens=181.6,
        truncated_share=0.035,
        batch_halved=False,
        device="a test CPU",
        grader=EXACT,
    )


def panels(fig):
    """[(left axes, right axes)] from left to right."""
    axes = sorted(fig.axes, key=lambda ax: ax.get_position().x0)
    pairs = [axes[i : i + 2] for i in range(0, len(axes), 2)]
    return [(a, b) if a.yaxis.get_label_position() == "left" else (b, a) for a, b in pairs]


def bars(ax):
    (container,) = [c for c in ax.containers if isinstance(c, matplotlib.container.BarContainer)]
    return container


def line_of(right):
    (line,) = [line for line in right.lines if line.get_gid() == "line"]
    return line


def words(fig):
    fig.draw_without_rendering()
    return [t for t in fig.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible()]


def all_text(fig):
    return " ".join(text.get_text() for text in words(fig)).replace("\n", " ")


def overlapping(fig):
    texts = {id(text): text for text in words(fig)}
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts.values()]
    return [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]


def outside(fig):
    return [
        t.get_text()
        for t in words(fig)
        if t.get_window_extent().x0 < 0 or t.get_window_extent().x1 > fig.bbox.x1 or t.get_window_extent().y0 < 0
    ]


def test_published_titles_axes_and_ticks_are_the_papers(published):
    pairs = panels(published_figure(published))
    assert [left.get_title() for left, _ in pairs] == [
        "R1-Qwen | AIME24",
        "R1-Qwen | AIME25",
        "R1-Qwen | AMC23",
        "R1-Qwen | GPQA-D",
    ]
    assert [left.get_ylim() for left, _ in pairs] == [(20, 60), (10, 50), (60, 100), (30, 70)]
    for left, right in pairs:
        assert right.get_ylim() == (600, 800)
        assert list(left.get_xticks()) == [2500, 3000, 3500, 4000, 4500, 5000]
        assert [t.get_text() for t in left.get_xticklabels()] == [
            "2500",
            "3000",
            "3500",
            "4000",
            "4500",
            "5000",
        ]
        labels = left.get_xlabel(), left.get_ylabel(), right.get_ylabel()
        assert labels == ("KV Budget", "Pass@1", "Throughput (TPS)")


def test_published_bars_and_line_are_the_numbers_in_the_file(published):
    with open(PUBLISHED / "r1-qwen.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    for left, right in panels(published_figure(published)):
        here = [r for r in rows if left.get_title().endswith("| " + r["dataset"])]
        budgets = [float(r["kv_budget"]) for r in here]
        drawn = [(bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height()) for bar in bars(left)]
        assert drawn == [pytest.approx((b, float(r["pass_at_1"]))) for b, r in zip(budgets, here, strict=True)]
        assert [t.get_text() for t in left.texts] == [r["pass_at_1"] for r in here]
        line = line_of(right)
        assert list(line.get_xdata()) == budgets
        assert list(line.get_ydata()) == [float(r["throughput_tps"]) for r in here]


def test_published_has_one_legend_in_the_top_right_of_the_last_chart(published):
    fig = published_figure(published)
    legends = [(ax, ax.get_legend()) for ax in fig.axes if ax.get_legend()]
    assert len(legends) == 1 and not fig.legends
    ax, legend = legends[0]
    assert ax in panels(fig)[-1]
    assert [t.get_text() for t in legend.get_texts()] == ["Pass@1", "Throughput"]
    fig.draw_without_rendering()
    box, frame = legend.get_window_extent(), ax.get_window_extent()
    assert frame.x1 - 20 < box.x1 < frame.x1 and frame.y1 - 20 < box.y1 < frame.y1


@pytest.mark.parametrize("kind", ["published", "measured"])
def test_bars_are_blue_and_the_line_is_orange_with_white_edged_markers(kind, published, measured):
    fig = published_figure(published) if kind == "published" else measured_figure(measured, EXPECTED)
    for left, right in panels(fig):
        assert {to_hex(bar.get_facecolor()) for bar in bars(left)} == {"#0072b2"}
        line = line_of(right)
        assert to_hex(line.get_color()) == "#d55e00"
        assert line.get_marker() == "o" and line.get_markeredgecolor() == "white"
        assert right.yaxis.label.get_color() == "#B84A00"


def test_published_and_measured_each_say_which_they_are(published, measured):
    published_text = all_text(published_figure(published))
    measured_text = all_text(measured_figure(measured, EXPECTED))
    assert "Published (DynTS, arXiv 2601.18383), not measured here" in published_text
    assert "about ±30" in published_text
    assert "Measured here: Tiny-0.8M" in measured_text and "Published" not in measured_text
    assert TINY_CAVEAT in measured_text
    assert "Graded by" not in measured_text
    for fact in ["a test CPU", "Wilson", "95 %", "DynTS", "batch size 20", "5 rounds", "640 new tokens"]:
        assert fact in measured_text


@pytest.mark.parametrize("value", [float("nan"), 63.0])
def test_a_published_value_that_is_missing_or_off_its_axis_is_refused(value, published):
    published.loc[5, "throughput_tps"] = value
    with pytest.raises(ConfigError, match="throughput_tps of R1-Qwen, AIME24, KV budget 5000"):
        published_figure(published)


def test_of_the_llama_figure_what_is_known_is_drawn_and_the_rest_named():
    llama = load_published(PUBLISHED / "r1-llama.csv")
    fig = published_figure(llama)
    *datasets, (last, last_right) = panels(fig)
    assert [left.get_title() for left, _ in [*datasets, (last, None)]] == [
        f"R1-Llama | {name}" for name in ("AIME24", "AIME25", "AMC23", "GPQA-D")
    ]
    assert all(len(bars(left)) == 6 and not right.lines for left, right in datasets)
    assert last_right.get_ylabel() == "Throughput (TPS), mean of the four"
    assert list(line_of(last_right).get_ydata()) == [580, 525, 490, 470, 450, 420]
    assert "known as the mean over the four datasets only" in all_text(fig)
    published_height = published_figure(load_published(QWEN)).get_size_inches()[1]
    assert list(fig.get_size_inches()) == pytest.approx([16.96, published_height + 0.2])
    assert set(published_table(llama).iloc[:24, -1]) == {"not readable"}
    assert overlapping(fig) == [] and outside(fig) == []
    llama.loc[25, "throughput_tps"] = float("nan")  # a hole in a line is a fault
    with pytest.raises(ConfigError, match="throughput_tps of R1-Llama, Mean, KV budget 3000"):
        published_figure(llama)


def test_the_published_mean_is_the_mean_of_the_four():
    llama = load_published(PUBLISHED / "r1-llama.csv")
    means = llama[llama["dataset"] != "Mean"].groupby("kv_budget")["pass_at_1"].mean()
    printed = llama[llama["dataset"] == "Mean"].set_index("kv_budget")["pass_at_1"]
    assert (means - printed).abs().max() < 0.11


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text.splitlines()[0],
        lambda text: text.replace("pass_at_1", "accuracy"),
        lambda text: text.replace("42.7", "forty"),
        lambda text: text.replace("42.7", ""),
        lambda text: text.replace("42.7", "427"),
        lambda text: "\n".join(text.splitlines()[:-3]),
        lambda text: text + text.splitlines()[1] + "\n",
        lambda text: "\x00\x01" + text,
    ],
    ids=["empty", "no rows", "column", "word", "hole", "over 100", "cut short", "row twice", "binary"],
)
def test_a_damaged_published_file_is_named_with_the_next_step(damage, tmp_path):
    path = tmp_path / "r1-qwen.csv"
    path.write_text(damage((PUBLISHED / "r1-qwen.csv").read_text()))
    with pytest.raises(ConfigError, match=r"r1-qwen\.csv.*git checkout"):
        load_published(path)


def test_a_missing_published_file_is_named_with_the_next_step(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.csv.*git checkout"):
        load_published(tmp_path / "absent.csv")


def test_measured_bars_line_and_intervals_are_the_records(measured):
    for dataset, (left, right) in zip(DATASETS, panels(measured_figure(measured, EXPECTED)), strict=True):
        rows = measured[(measured["dataset"] == dataset) & measured["kv_budget"].notna()]
        assert [bar.get_height() for bar in bars(left)] == rows["pass_at_1"].tolist()
        assert [bar.get_y() for bar in bars(left)] == [0] * 6
        whiskers = [c for c in left.containers if isinstance(c, matplotlib.container.ErrorbarContainer)]
        ends = [c.lines[2][0].get_segments()[0][:, 1] for c in whiskers]
        assert np.allclose(ends, rows[["pass_low", "pass_high"]])
        for bar, whisker in zip(bars(left), whiskers, strict=True):
            x = whisker.lines[2][0].get_segments()[0][0, 0]
            assert bar.get_x() < x < bar.get_x() + bar.get_width()
        line = line_of(right)
        assert list(line.get_xdata()) == BUDGETS and list(line.get_ydata()) == rows["throughput"].tolist()
        ends = [line.get_ydata().tolist() for line in right.lines if line.get_gid() == "repeats"]
        spans = rows[["throughput_low", "throughput_high"]].to_numpy().tolist()
        (full,) = [line for line in right.lines if line.get_gid() == "full"]
        reference = measured[(measured["dataset"] == dataset) & measured["kv_budget"].isna()].iloc[0]
        assert list(full.get_ydata()) == [reference["throughput"]] and full.get_markerfacecolor() == "white"
        assert ends == [*spans, [reference["throughput_low"], reference["throughput_high"]]]


def test_measured_shows_the_full_cache_level_and_names_it(measured):
    for dataset, (left, _) in zip(DATASETS, panels(measured_figure(measured, EXPECTED)), strict=True):
        level = measured[(measured["dataset"] == dataset) & measured["kv_budget"].isna()]["pass_at_1"].item()
        (line,) = [line for line in left.lines if line.get_label() == "full cache"]
        assert list(line.get_ydata()) == [level, level] and line.get_linestyle() != "-"
        assert ("100" if level == 100 else f"{level:.1f}") in [t.get_text() for t in left.texts]
        assert left.get_xticklabels()[-1].get_text() == "full"


def test_measured_prints_every_value_and_n(measured):
    for dataset, (left, _) in zip(DATASETS, panels(measured_figure(measured, EXPECTED)), strict=True):
        rows = measured[(measured["dataset"] == dataset) & measured["kv_budget"].notna()]
        printed = {t.get_text() for t in left.texts}
        assert {f"{v:.1f}" for v in rows["pass_at_1"]} <= printed
        assert left.get_title() == f"Tiny-0.8M | {dataset} (n = 200)"
        assert left.get_xlabel() == "KV Budget"


def test_measured_axes_start_at_zero_hold_every_value_and_are_shared(measured):
    pairs = panels(measured_figure(measured, EXPECTED))
    assert {left.get_ylim() for left, _ in pairs} == {(0, 116)}
    assert {tuple(left.get_yticks()) for left, _ in pairs} == {(0, 20, 40, 60, 80, 100)}
    ((low, high),) = {right.get_ylim() for _, right in pairs}
    assert low == 0 and high > measured["throughput_high"].max()


def test_measured_axis_names_the_throughput_definition(measured):
    assert panels(measured_figure(measured, EXPECTED))[-1][1].get_ylabel().replace("\n", " ") == DEFINITION


def test_several_samples_per_problem_are_said_to_be_bootstrapped(measured):
    text = all_text(measured_figure(measured.assign(n_samples=5), EXPECTED))
    assert "bootstrap over problems" in text and "5 samples per problem" in text and "Wilson" not in text


def test_cells_whose_batch_was_halved_are_named_under_the_chart_and_in_the_table(measured):
    halved = measured.assign(batch_halved=[cell == ("Chain-B", 64) for cell in EXPECTED])
    said = [text.get_text() for text in measured_figure(halved, EXPECTED).texts]
    assert any("half the rows" in text and "Chain-B at KV budget 64." in text for text in said)
    table = measured_table(halved)
    assert table.loc[table["Batch halved"] == "yes", ["Dataset", "KV budget"]].values.tolist() == [["Chain-B", "64"]]
    assert not any("half" in text.get_text() for text in measured_figure(measured, EXPECTED).texts)
    assert "Batch halved" not in measured_table(measured)


def test_missing_cells_are_refused_by_name(measured):
    with pytest.raises(IncompleteError) as error:
        measured_figure(measured.drop([3, 13, 20]), EXPECTED)
    assert str(error.value) == (
        "3 of 28 cells missing: Chain-A at KV budget 96, Chain-B at full cache, Chain-C at full cache; "
        "run `make charts` again"
    )


def test_nothing_measured_is_refused_even_when_incomplete_is_allowed():
    with pytest.raises(IncompleteError, match="28 of 28"):
        measured_figure(pd.DataFrame(), EXPECTED, allow_incomplete=True)


@pytest.mark.parametrize("expected", [[], [("Chain-A", None)]], ids=["nothing", "full cache alone"])
def test_a_grid_without_a_budget_is_refused(expected, measured):
    with pytest.raises(ConfigError, match="expected names no KV budget"):
        measured_figure(measured, expected)


def test_missing_cells_are_marked_when_allowed(measured):
    fig = measured_figure(measured.drop([3, 13]), EXPECTED, allow_incomplete=True)
    assert "INCOMPLETE: 2 of 28 cells missing" in all_text(fig)
    (first, first_right), (second, _), (third, _), _ = panels(fig)
    assert len(bars(first)) == 5 and "missing" in [t.get_text() for t in first.texts]
    assert np.isnan(line_of(first_right).get_ydata()[3])
    assert "full cache missing" in [t.get_text() for t in second.texts]
    marks = [
        len([p for p in ax.patches if p.get_gid() == "missing" and p.get_hatch()]) for ax in (first, second, third)
    ]
    assert marks == [1, 1, 0]
    assert "INCOMPLETE" not in all_text(measured_figure(measured, EXPECTED, allow_incomplete=True))


def test_without_timing_only_bars_are_drawn_and_the_note_says_so(measured):
    bare = measured.drop(columns=TIMED_COLUMNS)
    fig = measured_figure(bare, EXPECTED)
    for left, right in panels(fig):
        assert len(bars(left)) == 6 and not right.lines and list(right.get_yticks()) == []
    assert "Throughput was not measured: the study asks for no timing." in all_text(fig)
    assert overlapping(fig) == [] and outside(fig) == []
    assert not any("hroughput" in name for name in measured_table(bare))
    assert "not measured" not in all_text(measured_figure(measured, EXPECTED))


def test_a_dataset_that_is_not_timed_yet_is_refused_by_name_or_marked(measured):
    there = measured["dataset"] != "Chain-A"
    untimed = measured.assign(**{name: measured[name].where(there) for name in TIMED_COLUMNS})
    with pytest.raises(IncompleteError, match="throughput of 7 of 28 cells missing: Chain-A at KV budget 48"):
        measured_figure(untimed, EXPECTED)
    fig = measured_figure(untimed, EXPECTED, allow_incomplete=True)
    assert "INCOMPLETE: throughput of 7 of 28 cells missing" in all_text(fig)
    left, right = panels(fig)[0]
    assert "5 rounds" in all_text(fig)
    assert len(bars(left)) == 6 and np.isnan(line_of(right).get_ydata()).all()
    shown, whole = (measured_table(df)[DEFINITION].tolist() for df in (untimed, measured))
    assert shown == ["not timed"] * 7 + whole[7:]
    none = measured.assign(**dict.fromkeys(TIMED_COLUMNS, float("nan")))
    assert "Throughput is not measured yet." in all_text(measured_figure(none, EXPECTED, allow_incomplete=True))


def test_an_interval_of_one_repeat_is_no_interval(measured):
    once = measured.assign(n_repeats=1, throughput_low=measured["throughput"], throughput_high=measured["throughput"])
    fig = measured_figure(once, EXPECTED)
    assert not [line for _, right in panels(fig) for line in right.lines if line.get_gid() == "repeats"]
    assert "one round, so without an interval" in all_text(fig)
    assert measured_table(once)[DEFINITION].iloc[0] == "1,008"


def test_a_line_whose_repeats_spread_further_than_it_falls_is_said_to_tell_nothing(measured):
    wide = measured.assign(throughput_high=measured["throughput_high"] + 400 * (measured["dataset"] == "Chain-C"))
    assert "On Chain-C the timing is too noisy" in all_text(measured_figure(wide, EXPECTED))
    busy = measured.assign(too_busy=measured["dataset"] == "Chain-D")
    assert "On Chain-D the timing is too noisy" in all_text(measured_figure(busy, EXPECTED))
    assert "too noisy" not in all_text(measured_figure(measured, EXPECTED))
    told, untold = wide.assign(ends_differ=True), measured.assign(ends_differ=False)
    assert "too noisy" not in all_text(measured_figure(told, EXPECTED))  # pairs tell more than whiskers
    assert "On Chain-A, Chain-B, Chain-C, Chain-D the timing is too noisy" in all_text(
        measured_figure(untold, EXPECTED)
    )


def test_where_nothing_was_solved_a_sentence_stands_for_the_bars(measured):
    none = measured.copy()
    none.loc[none["dataset"] == "Chain-D", PASS] = [0.0, 0.0, 1.9]
    fig = measured_figure(none, EXPECTED)
    *solved, (left, right) = panels(fig)
    assert all(len(bars(ax)) == 6 for ax, _ in solved)
    assert not left.containers and not left.lines and len(line_of(right).get_ydata()) == 6
    said = "0 of 200 problems solved at every KV budget and by the full cache (95 % interval: 0 to 1.9 %)"
    assert [t.get_text().replace("\n", " ") for t in left.texts] == [said]
    assert overlapping(fig) == [] and outside(fig) == []


def test_a_dataset_with_no_cells_keeps_its_panel(measured):
    fig = measured_figure(measured[measured["dataset"] != "Chain-B"], EXPECTED, allow_incomplete=True)
    left, _ = panels(fig)[1]
    assert left.get_title() == "Tiny-0.8M | Chain-B (missing)"
    assert [t.get_text() for t in left.texts] == ["missing"] * 6 + ["full cache missing"]


@pytest.mark.parametrize("name", [*PASS, *SPEED])
@pytest.mark.parametrize("row, cell", [(2, "Chain-A at KV budget 80"), (27, "Chain-D at full cache")])
def test_a_nan_is_refused_with_its_cell(name, row, cell, measured):
    measured.loc[row, name] = float("nan")
    for draw in [
        lambda: measured_figure(measured, EXPECTED),
        lambda: measured_table(measured),
    ]:
        with pytest.raises(ConfigError, match=f"{name} of {cell} is nan"):
            draw()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda df: df.drop(columns="device"), "lack column device"),
        (lambda df: pd.concat([df, df.iloc[[4]]]), "Chain-A at KV budget 112 is there twice"),
        (lambda df: df.assign(policy=["H2O"] + ["DynTS"] * 27), "one policy per chart, got H2O, DynTS"),
        (lambda df: df.assign(n_problems=[199] + [200] * 27), "Chain-A has cells of different n_problems"),
        (
            lambda df: df.assign(pass_low=df["pass_at_1"] + 1),
            "pass_at_1 of Chain-A at KV budget 48 is 3.0: outside",
        ),
        (
            lambda df: df.assign(kv_budget=df["kv_budget"].replace(48, 49)),
            "not part of this grid: Chain-A at KV",
        ),
    ],
    ids=["column", "twice", "policies", "n", "interval", "unexpected"],
)
def test_rows_that_do_not_belong_on_one_chart_are_refused(change, message, measured):
    with pytest.raises(ConfigError, match=message):
        measured_figure(change(measured), EXPECTED)


def test_no_words_overlap_or_leave_the_page(published, measured):
    for fig in [
        published_figure(published),
        measured_figure(measured, EXPECTED),
        measured_figure(measured.drop([3, 13]), EXPECTED, allow_incomplete=True),
        measured_figure(measured.iloc[:7], EXPECTED[:7]),
    ]:
        assert overlapping(fig) == [] and outside(fig) == []


def test_uneven_budgets_get_equal_steps_and_the_axis_says_so(measured):
    doubling = dict(zip(BUDGETS, [32, 64, 128, 256, 512, 1024], strict=True))
    df = measured.assign(kv_budget=measured["kv_budget"].map(doubling))
    left, _ = panels(measured_figure(df, [(d, doubling.get(b)) for d, b in EXPECTED]))[0]
    assert left.get_xlabel() == "KV Budget (not to scale)"
    assert [t.get_text() for t in left.get_xticklabels()] == ["32", "64", "128", "256", "512", "1024", "full"]
    assert set(np.diff(left.get_xticks())[:-1]) == {1}


def test_tables_hold_the_numbers_of_the_charts(published, measured):
    table = published_table(published)
    assert len(table) == 24
    assert table.iloc[0].tolist() == ["R1-Qwen", "AIME24", "2500", "42.7", "780"]

    shuffled = measured.sample(frac=1, random_state=0)
    table = measured_table(shuffled)
    assert len(table) == 28
    chain_a = table[table["Dataset"] == "Chain-A"]
    assert chain_a["KV budget"].tolist() == ["48", "64", "80", "96", "112", "128", "full cache"]
    assert chain_a.iloc[0].to_dict() == {
        "Dataset": "Chain-A",
        "KV budget": "48",
        "n": "200",
        "Pass@1 (%) with 95 % interval": "3.0 (0.0 to 7.0)",
        DEFINITION: "1,008 (978 to 1,028)",
        "Mean output (tokens)": "182",
        "Truncated (%)": "3.5",
    }


def test_save_gives_the_same_bytes_twice_and_leaves_only_the_two_files(measured, tmp_path):
    first = save(measured_figure(measured, EXPECTED), tmp_path / "new" / "tiny-0.8")
    before = [path.read_bytes() for path in first]
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.hashsalt": "other", **HOSTILE}):
        second = save(measured_figure(measured, EXPECTED), tmp_path / "new" / "tiny-0.8")
    assert [path.read_bytes() for path in second] == before
    assert [path.name for path in first] == ["tiny-0.8.png", "tiny-0.8.svg"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tiny-0.8.png", "tiny-0.8.svg"]
    assert before[0].startswith(b"\x89PNG") and b"<svg" in before[1] and b"<dc:date>" not in before[1]


def test_a_save_that_fails_keeps_the_old_files_and_says_where(published, tmp_path, monkeypatch):
    fig = published_figure(published)
    (tmp_path / "chart.png").write_text("old")

    def refuse(source, target):
        raise PermissionError("no")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(PermissionError, match=f"cannot write charts to {tmp_path}"):
        save(fig, tmp_path / "chart")
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]
    assert (tmp_path / "chart.png").read_text() == "old"


def test_figures_needs_neither_torch_nor_pyplot():
    code = "import sys, kvlib.charts.measured; print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.strip() == "[]", run.stderr


SIZES = {"AIME24": 30, "AIME25": 30, "AMC23": 40, "GPQA-D": 198}


@pytest.fixture(scope="module")
def r1_verdicts():
    """Made-up verdicts at R1-Qwen's sizes: 5 samples a problem, Pass@1 rising by about 2 points a budget."""
    rng = np.random.default_rng(1)
    frames = []
    for dataset, n in SIZES.items():
        skill = rng.normal(0, 1.7, n)
        for step, budget in enumerate(range(2500, 5001, 500)):
            chance = 1 / (1 + np.exp(-(skill + 0.12 * step)))
            right = rng.random((n, 5)) < chance[:, None]
            index = [(f"{dataset}/{i}", k) for i in range(n) for k in range(5)]
            frame = pd.DataFrame(index, columns=["problem", "sample"])
            frames.append(frame.assign(dataset=dataset, kv_budget=float(budget), correct=right.ravel()))
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def r1_cells(r1_verdicts):
    cells = r1_verdicts.groupby(["dataset", "kv_budget"], sort=False)["correct"].mean().mul(100).reset_index()
    rate, speed = cells["correct"], 3600 - cells["kv_budget"] / 5
    return cells.assign(
        model="R1-Qwen",
        policy="DynTS as published",
        kv_budget=cells["kv_budget"].astype(int),
        pass_at_1=rate,
        pass_low=rate - 9,
        pass_high=rate + 9,
        n_problems=cells["dataset"].map(SIZES),
        n_samples=5,
        throughput=speed,
        throughput_low=speed - 50,
        throughput_high=speed + 40,
        throughput_definition=DEFINITION,
        batch_size=20,
        n_repeats=5,
        too_busy=False,
        ends_differ=None,
        throughput_interval="lowest to highest",
        max_new_tokens=640,
        mean_tokens=181.6,
        truncated_share=0.035,
        batch_halved=False,
        device="no machine",
        grader=PUBLISHED_RULES,
    )


def beside(cells, published, **options):
    expected = [(dataset, budget) for dataset in SIZES for budget in range(2500, 5001, 500)]
    return measured_figure(cells, expected, published=[load_published(LLAMA), published], **options)


def test_published_values_stand_hatched_beside_the_measured_ones_and_each_is_named(r1_cells, published):
    fig = beside(r1_cells, published)
    for dataset, (left, right) in zip(SIZES, panels(fig), strict=True):
        solid, hatched = (c for c in left.containers if isinstance(c, matplotlib.container.BarContainer))
        theirs = published[published["dataset"] == dataset]
        assert [b.get_height() for b in solid] == r1_cells[r1_cells["dataset"] == dataset]["pass_at_1"].tolist()
        assert [b.get_height() for b in hatched] == theirs["pass_at_1"].tolist()
        assert all(b.get_hatch() for b in hatched) and not any(b.get_hatch() for b in solid)
        for a, b in zip(solid, hatched, strict=True):
            assert a.get_x() + a.get_width() < b.get_x()
        ours = line_of(right)
        (dashed,) = [line for line in right.lines if line.get_label() == "published"]
        assert ours.get_linestyle() == "-" and dashed.get_linestyle() == "--"
        assert list(dashed.get_ydata()) == theirs["throughput_tps"].tolist()
    text = all_text(fig)
    for said in ["Measured here: R1-Qwen", "beside the published values", BESIDE_NOTE,
                 "Graded by the published rules"]:  # fmt: skip
        assert said in text
    (legend,) = [ax.get_legend() for ax in fig.axes if ax.get_legend()]
    labels = [t.get_text() for t in legend.get_texts()]
    assert labels == ["Pass@1 (left)", "published", "Throughput (right)", "published"]
    assert outside(fig) == []


def test_only_the_same_model_and_the_published_rules_stand_beside_published_bars(r1_cells, published):
    others = [r1_cells.assign(grader="strict rules"), r1_cells.assign(grader=EXACT), r1_cells.assign(model="SmolLM2")]
    for cells in [*others, r1_cells.assign(grader=["exact checker", *r1_cells["grader"][1:]])]:
        assert BESIDE_NOTE not in all_text(beside(cells, published))
    assert "Graded by the strict rules." in all_text(beside(others[0], published))
    assert "Graded by the exact checker and the published rules." in all_text(beside(cells, published))


def test_a_missing_cell_beside_published_values_is_refused_or_marked(r1_cells, published):
    with pytest.raises(IncompleteError, match="AIME24 at KV budget 4000"):
        beside(r1_cells.drop(3), published)
    fig = beside(r1_cells.drop(3), published, allow_incomplete=True)
    assert "INCOMPLETE: 1 of 24 cells missing" in all_text(fig)
    left, _ = panels(fig)[0]
    ours, theirs = (c for c in left.containers if isinstance(c, matplotlib.container.BarContainer))
    assert len(ours) == 5 and len(theirs) == 6
    (mark,) = [p for p in left.patches if p.get_gid() == "missing"]
    assert mark.get_x() + mark.get_width() < theirs[3].get_x()


def test_every_pair_of_budgets_is_in_the_triangle_and_only_real_differences_stand_out(r1_verdicts):
    pairs = budget_differences(r1_verdicts)
    fig = pairs_figure(pairs, "R1-Qwen")
    assert len(fig.axes) == 4
    for ax, (dataset, rows) in zip(fig.axes, pairs.groupby("dataset", sort=False), strict=True):
        assert (
            ax.get_title() == f"R1-Qwen | {dataset} (n = {SIZES[dataset]}): {rows['differs'].sum()} of 15 pairs differ"
        )
        bold = [t.get_text() for t in ax.texts if t.get_weight() == "bold"]
        assert bold == [f"{d:+.1f}".replace("-", "−") for d in rows[rows["differs"]]["difference"]]
        assert len(ax.texts) == 30
        shown = [t.get_text() for t in ax.texts[1::2]]
        assert shown[0] == f"{rows['low'].iloc[0]:+.1f} to {rows['high'].iloc[0]:+.1f}".replace("-", "−")
        coloured = [p for p in ax.patches if to_hex(p.get_facecolor()) != "#f0f0f0"]
        assert len(coloured) == rows["differs"].sum()
    assert 0 < pairs["differs"].sum() < len(pairs)  # else the test above shows nothing
    assert overlapping(fig) == [] and outside(fig) == []
    table = pairs_table(pairs)
    assert len(table) == 60 and set(table.iloc[:, -1]) == {"yes", "no"}


def test_a_study_of_one_budget_has_a_sentence_in_place_of_triangles_and_an_empty_table(r1_verdicts):
    pairs = budget_differences(r1_verdicts[r1_verdicts["kv_budget"] == 2500])
    assert "There are no two KV budgets" in all_text(pairs_figure(pairs, "R1-Qwen"))
    assert pairs_table(pairs).empty


def test_budgets_that_solve_the_same_problems_get_a_sentence_in_place_of_a_triangle():
    rows = [
        (name, budget, i, 0, name == "A" and i < budget) for name in "AB" for budget in (8.0, 16.0) for i in range(20)
    ]
    pairs = budget_differences(pd.DataFrame(rows, columns=["dataset", "kv_budget", "problem", "sample", "correct"]))
    fig = pairs_figure(pairs, "m")
    assert [ax.get_title() for ax in fig.axes] == ["m | A (n = 20): 1 of 1 pairs differ"]
    assert "B: the same problems are solved, or none, whatever the KV budget" in all_text(fig)
    assert not pairs_figure(pairs[pairs["dataset"] == "B"], "m").axes
