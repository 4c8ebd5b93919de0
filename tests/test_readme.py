"""What the README and the results page say is what was measured."""

import csv
import json
import re
from math import isnan
from pathlib import Path

import pytest

from kvlib.charts.answer import answers
from kvlib.charts.measured import measured_table
from kvlib.charts.replays import divergence_table
from kvlib.charts.tables import expected_cells, measured_cells, measured_verdicts
from kvlib.charts.throughput import load_bench, throughput_table
from kvlib.compare import load_cells, load_comparison, load_replays
from kvlib.config import load_grid
from kvlib.stats import Ratio, budget_differences
from kvlib.tasks.datasets import dataset_title

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "RESULTS.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("study", ["tiny", "qwen-coder"])
def test_the_table_of_a_study_is_the_committed_records(study):
    grid = load_grid(ROOT / "notebooks" / f"{study}.yml")
    cells = measured_cells(grid, ROOT / "results" / study / "records", seed=0)
    assert len(cells) == len(expected_cells(grid, 0)) == 28
    table = measured_table(cells)
    with (ROOT / "results" / study / "measured.csv").open() as file:
        assert list(csv.reader(file)) == [list(table.columns), *table.values.tolist()]
    for row in table.values.tolist():
        assert f"| {' | '.join(row)} |" in RESULTS


@pytest.mark.parametrize("study", ["tiny", "qwen-coder"])
def test_the_answer_is_that_of_the_committed_records(study):
    grid, records = load_grid(ROOT / "notebooks" / f"{study}.yml"), ROOT / "results" / study / "records"
    found = answers(measured_verdicts(grid, records, 0), measured_cells(grid, records, 0), 5.0, None)
    assert [sentence for sentence in found["sentence"] if f"- {sentence}\n" not in RESULTS] == []
    named = {name: int(b) for name, b in zip(found["dataset"], found["kv_budget"], strict=True) if not isnan(b)}
    assert named and [name for name, budget in named.items() if f"{budget} slots on {name}" not in README] == []
    others = {"tiny": "196 slots on Chain-A; on the other three none", "qwen-coder": "on lcm none of the six"}[study]
    assert others in README and len(named) == {"tiny": 1, "qwen-coder": 3}[study]


def test_the_difference_between_the_ends_is_that_of_the_committed_records():
    grid, records = load_grid(ROOT / "notebooks" / "qwen-coder.yml"), ROOT / "results" / "qwen-coder" / "records"
    pairs = budget_differences(measured_verdicts(grid, records, 0))
    ends = pairs[(pairs["fewer"] == min(grid.kv_budgets)) & (pairs["more"] == max(grid.kv_budgets))]
    for row in ends.itertuples():
        told = f"- {row.dataset}: {row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f}) points"
        assert re.sub(r"(?<=[ (])-(?=\d)", "−", told) in RESULTS
    assert len(ends) == 4


def test_the_larger_model_is_its_committed_records():
    grid, records = load_grid(ROOT / "notebooks" / "qwen-coder-1-5b.yml"), ROOT / "results/qwen-coder-1-5b/records"
    cells, verdicts = measured_cells(grid, records, seed=0), measured_verdicts(grid, records, 0)
    assert len(cells) == len(expected_cells(grid, 0)) == 7
    for row in measured_table(cells).values.tolist():
        assert f"| {' | '.join(row)} |" in RESULTS
    assert f"- {answers(verdicts, cells, 5.0, None)['sentence'].item()}\n" in RESULTS
    pairs = budget_differences(verdicts).set_index(["fewer", "more"])
    ends = pairs.loc[(min(grid.kv_budgets), max(grid.kv_budgets))]
    told = f"{ends.difference:+.1f} ({ends.low:+.1f} to {ends.high:+.1f}) points, {ends.wins} problems won"
    assert re.sub(r"(?<=[ (])-(?=\d)", "−", told) in RESULTS


@pytest.mark.parametrize("place", ["", "epyc"])
def test_the_speed_is_the_committed_record(place):
    folder = ROOT / "results" / "bench" / place
    for row in throughput_table(load_bench(folder, "smollm2")).values.tolist():
        assert f"| {' | '.join(row)} |" in RESULTS
    record = json.loads((folder / "smollm2.json").read_text())
    ratios = {(row["arm"], row["against"]): row for row in record["ratios"]}
    for pair in [("knorm", "kvpress-knorm"), ("snapkv-kvpress", "kvpress-snapkv-kvpress"), ("full", "hf-sdpa"),
                 ("full", "linears"), ("full", "full-unpacked"), ("full-unpacked", "hf-sdpa"), ("knorm", "full"),
                 ("full", "full-again")]:  # fmt: skip
        assert "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**ratios[pair]) in RESULTS
    assert f"{next(row['steps'] for row in record['arms'] if row['arm'] == 'products'):.0f} tokens/s" in RESULTS


@pytest.mark.parametrize("study", ["tiny", "qwen-coder"])
def test_the_ends_of_the_lines_are_those_of_the_committed_records(study):
    paths = sorted((ROOT / "results" / study / "records").glob("*/timing/s0/record.json"))
    assert len(paths) == 4
    for path in paths:
        timing = json.loads(path.read_text())["timing"]
        assert str(Ratio.of(timing["ends"])) in RESULTS and f"{timing['control']['ratio']:.3f}" in RESULTS


def test_the_speed_beside_llama_cpp_is_the_committed_records():
    folder = ROOT / "results" / "bench" / "llama.cpp"
    for row in throughput_table(load_bench(folder, "qwen-coder")).values.tolist():
        assert f"| {' | '.join(row)} |" in RESULTS
    for path in folder.glob("*.json"):
        ratios = {(row["arm"], row["against"]): row for row in json.loads(path.read_text())["ratios"]}
        for arm in ("full", "full-int8"):
            assert "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**ratios[arm, "llama.cpp"]) in RESULTS
    rows = {row["arm"]: row for row in json.loads((folder / "batch-8.json").read_text())["arms"]}
    prefill = [f"{8 * 64 / rows[arm]['prefill_seconds']:.0f}" for arm in ("full-int8", "full", "llama.cpp")]
    assert "{} tokens/s in 8 bits, {} in float32, {} by llama.cpp".format(*prefill) in RESULTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_is_read_in_two_minutes():
    assert len(README) <= 7000


def test_the_numbers_in_the_readme_are_those_of_the_results():
    """Every number with an interval stands in RESULTS.md, which the tests above hold against the records."""
    found = re.findall(r"[+−]?[\d.]+ \([+−]?[\d.]+ to [+−]?[\d.]+\)", README)
    assert len(found) >= 5
    assert [number for number in found if number not in RESULTS] == []


@pytest.mark.parametrize("name", ["compare", "qwen-coder-policies"])
def test_the_comparison_is_the_published_one(name):
    with (ROOT / "results" / name / "grid-prompt.csv").open() as file:
        for row in csv.reader(file):
            assert f"| {' | '.join(row)} |" in RESULTS


def test_the_published_comparison_is_whole():
    """Every cell of the file that asks for them is there, but those of models that are not shipped may be anyone's."""
    comparison = load_comparison(ROOT / "notebooks" / "compare.yml")
    cells = load_cells(ROOT / "results" / "compare", seeds=range(99))
    asked = {
        (c.config.model, dataset_title(c.config.dataset), c.arm, c.protected, c.config.kv_budget)
        for c in comparison.cells
    }
    there = {
        (row.model, row.dataset, row.arm, row.protected, None if isnan(row.kv_budget) else int(row.kv_budget))
        for row in cells.itertuples()
    }
    assert there == asked
    assert (cells["n_problems"] == 200).all()


def test_the_speed_on_a_card_is_the_committed_record():
    arms = load_bench(ROOT / "results" / "bench" / "h100", "r1-qwen")
    for row in throughput_table(arms).values.tolist():
        assert f"| {' | '.join(row)} |" in RESULTS
    speed = {(row.batch, row.kv_budget): f"{row.tokens_per_s:,.0f}" for row in arms.itertuples()}
    told = f"{speed[20, 2500]} tokens/s at batch 20 and KV budget 2500, {speed[128, 2500]} at batch 128"
    assert told in README


@pytest.mark.parametrize(("name", "policy"), [("b136", "dynts"), ("b176", "dynts"), ("bfull", "full")])
def test_a_card_and_a_processor_gave_the_same_verdicts(name, policy):
    card = json.loads((ROOT / "results" / "bench" / "h100" / "chain-a" / f"{name}.json").read_text())
    own = json.loads((ROOT / f"results/tiny/records/chain-a/{policy}/{name}/s0/record.json").read_text())
    assert card["config"]["device"] == "cuda" and own["config"]["device"] == "cpu"
    assert card["verdicts"] == own["verdicts"] and card["results"] == own["results"]


def test_the_replays_on_real_weights_are_the_published_ones():
    results = ROOT / "results" / "qwen-coder-policies"
    lost, cells = load_replays(results), load_cells(results)
    for row in divergence_table(lost, "random").values.tolist():
        assert f"| {' | '.join(row)} |" in RESULTS
    assert len(cells) == 17 and lost.groupby(["arm", "kv_budget"], dropna=False).size().eq(30).all()
