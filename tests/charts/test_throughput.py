"""What a bench record's chart must not hide: an unfinished or noisy run, and a budget at which nothing was evicted."""

import itertools
import json
from pathlib import Path

import pytest

from kvlib.charts.throughput import arm_title, load_bench, throughput_figure, throughput_table
from kvlib.stats import BUSY

RECORD = Path(__file__).parents[2] / "results" / "bench" / "smollm2.json"


def drawn(folder, change=lambda record: None):
    record = json.loads(RECORD.read_text())
    change(record)
    (folder / "r.json").write_text(json.dumps(record))
    df = load_bench(folder, "smollm2")
    fig = throughput_figure(df)
    fig.draw_without_rendering()
    return df, fig, " ".join(text.get_text().replace("\n", " ") for text in fig.texts)


def arm(record, name):
    return next(row for row in record["arms"] if row["arm"] == name)


def test_a_whole_record_has_no_mark_and_the_reference_without_packed_weights(tmp_path):
    _, fig, said = drawn(tmp_path)
    assert not any(word in said for word in ("UNFINISHED", "NOISY", "NOTHING WAS EVICTED"))
    assert said.startswith("Measured here: SmolLM2-135M: throughput against KV budget")
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert {"full cache, weights not packed", "full cache", "roofline"} <= set(names)
    (ax,) = fig.axes
    assert ax.get_yscale() == "log", "the roofline leaves room for the data"


def test_points_at_one_budget_stand_apart(tmp_path):
    df, fig, _ = drawn(tmp_path)
    (ax,) = fig.axes
    here = df[df["kv_budget"] == 256]
    lines = {line.get_label(): line for line in ax.lines if line.get_marker() not in ("None", None)}
    at = sorted(x for line in lines.values() for x in line.get_xdata() if 0.5 < x < 1.5)
    assert len(at) == len(here) and min(b - a for a, b in itertools.pairwise(at)) > 0.1


@pytest.mark.parametrize(
    "change, mark",
    [
        (lambda r: r.update(complete=False), "UNFINISHED at batch 8: 8 of the rounds that were asked for"),
        (lambda r: r["noise"].update(ratio=4.5), "NOISY at batch 8: two runs of equal work differ 4.50 times"),
        (lambda r: r["noise"].update(ratio=1 + 0.9 * BUSY), ""),
        (lambda r: arm(r, "knorm@384").update(live_slots=320.5), "NOTHING WAS EVICTED at KV budget 384: knorm"),
    ],
    ids=["unfinished", "noisy", "quiet", "idle"],
)
def test_what_must_not_be_overlooked_stands_in_yellow(change, mark, tmp_path):
    df, _fig, said = drawn(tmp_path, change)
    assert mark in said and ("at batch" in said or "EVICTED" in said) == bool(mark)
    if "EVICTED" in mark:
        assert "384 (nothing evicted)" in throughput_table(df)["KV budget"].tolist()


def test_one_round_has_no_interval(tmp_path):
    def once(record):
        record["arms"] = [{**row, "seconds": row["seconds"][:1]} for row in record["arms"]]

    df, fig, said = drawn(tmp_path, once)
    assert "one round, so without an interval" in said
    assert throughput_table(df).iloc[0]["Tokens/s (slowest to fastest round)"] == "165.5 (one round)"
    assert not any(len(paths.get_paths()) for paths in fig.axes[0].collections)


def test_an_arm_is_called_by_its_policy_and_what_it_is_without():
    titles = {
        "full-unpacked": "full cache, weights not packed",
        "knorm-unpacked": "knorm, weights not packed",
        "hf-eager": "HF generate, eager attention",
        "kvpress-snapkv-kvpress": "snapkv, by kvpress",
        "rkv": "rkv",
    }
    assert {name: arm_title(name) for name in titles} == titles
