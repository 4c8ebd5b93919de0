"""From records to charts: whose verdicts, what is missing, and what n can tell."""

import math
from pathlib import Path

import pandas as pd
import pytest

from kvlib.charts.measured import SPEED, IncompleteError, measured_table
from kvlib.charts.tables import measured_cells, measured_verdicts, model_title, what_n_tells
from kvlib.config import load_grid
from kvlib.errors import ConfigError
from kvlib.record import RecordError, publish
from kvlib.stats import pass_at_1

ROOT = Path(__file__).parents[2]
GRID = """
study: small
model: deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
datasets: [chain-a]
kv_budgets: [2500, 3000]
full_cache: true
n_samples: 2
timing: {batch_size: 20, n_steps: 8, repeats: 3}
"""


@pytest.fixture
def study(tmp_path):
    """A grid and its records, of two problems; graded by both rules, as a benchmark is."""
    (tmp_path / "tiny.yml").write_text(GRID)
    grid = load_grid(tmp_path / "tiny.yml")
    speeds = []
    for cell in grid.cells(0):
        marks = {"chain-a/0": "11", "chain-a/1": "01"}
        results = {"n_samples": 4, "n_tokens": 400, "n_truncated": 0, "n_unanswered": 1, "strict_n_unanswered": 2}
        verdicts = {"correct": marks, "strict_correct": {"chain-a/0": "11", "chain-a/1": "00"}}
        record = {"fingerprint": "f", "config": cell.parameters(), "results": results, "verdicts": verdicts}
        record["cost"] = {"batch_halved": cell.kv_budget == 2500, "kv_bytes": 4096, "n_rows": 2}
        record["provenance"] = {"finished": {"cpu": "a CPU"}}
        publish(tmp_path / cell.cell_path, record)
        for name, speed in [("steps", 100.0), ("forward", 300.0)]:
            row = {"kv_budget": cell.kv_budget, "definition": name, "median": speed}
            speeds.append({**row, "low": speed - 1, "high": speed + 1, "repeats": [speed - 1, speed, speed + 1]})
    timing = {**grid.timing, "definition": "all-inclusive steps", "device": "no machine"}
    record = {"fingerprint": "t", "kind": "timing", "config": {}, "results": {"throughput": speeds}}
    publish(tmp_path / "chain-a" / "timing" / "s0", {**record, "timing": timing})
    return grid, tmp_path


def test_intervals_are_computed_from_the_verdicts_and_a_record_without_them_is_refused(study):
    grid, records = study
    cell = measured_cells(grid, records, 0).iloc[0]
    marks = [("0", True), ("0", True), ("1", False), ("1", True)]
    assert [cell[name] for name in ("pass_at_1", "pass_low", "pass_high")] == [
        100 * value for value in pass_at_1(marks)
    ]
    assert cell["bytes_per_row"] == 2048 and cell["n_problems"] == 2 and cell["n_samples"] == 2
    folder = records / grid.cells(0)[0].cell_path
    publish(folder, {"fingerprint": "f", "config": grid.cells(0)[0].parameters(), "results": {}, "cost": {}})
    with pytest.raises(RecordError, match="holds no verdicts per problem"):
        measured_cells(grid, records, 0)


def test_timing_is_optional_and_one_that_is_not_done_yet_is_nan(study):
    grid, records = study
    (records / "chain-a" / "timing" / "s0" / "record.json").unlink()
    cells = measured_cells(grid, records, 0)
    assert len(cells) == 3 and cells[SPEED].isna().all(axis=None) and set(cells["device"]) == {"a CPU"}
    (records / "tiny.yml").write_text(GRID.replace("timing:", "#"))
    assert "throughput" not in measured_cells(load_grid(records / "tiny.yml"), records, 0)


def test_each_grader_and_each_throughput_is_named_and_its_own(study):
    cells = measured_cells(*study, 0)
    assert set(cells["pass_at_1"]) == {75} and set(cells["grader"]) == {"published rules"}
    assert set(cells["throughput"]) == {100} and "all-inclusive steps" in cells["throughput_definition"].iloc[0]
    cells = measured_cells(*study, 0, "strict", "forward")
    assert set(cells["pass_at_1"]) == {50} and set(cells["grader"]) == {"strict rules"}
    assert set(cells["throughput"]) == {300}
    assert cells["throughput_definition"].iloc[0] == "Throughput (tokens/s, forward time only, as published)"
    with pytest.raises(ConfigError, match="unknown grader 'strikt'; did you mean strict"):
        measured_cells(*study, 0, "strikt")


def test_the_table_of_a_benchmark_has_strict_verdicts_and_what_was_not_answered(study):
    table = measured_table(measured_cells(*study, 0))
    assert list(table.columns[-2:]) == ["Strict Pass@1 (%)", "Without an answer (%)"]
    assert table.iloc[0, -2:].tolist() == ["50.0", "25.0"]
    assert measured_table(measured_cells(*study, 0, "strict")).iloc[0, -1] == "50.0"


def test_the_committed_table_stays_as_it_is():
    results = ROOT / "results" / "tiny"
    cells = measured_cells(load_grid(ROOT / "notebooks" / "tiny.yml"), results / "records", 0)
    assert measured_table(cells).to_csv(index=False) == (results / "measured.csv").read_text()


def test_a_halved_batch_reaches_the_table(study):
    grid, records = study
    table = measured_table(measured_cells(grid, records, 0))
    assert dict(zip(table["KV budget"], table["Batch halved"], strict=True)) == {
        "2500": "yes",
        "3000": "",
        "full cache": "",
    }


def test_verdicts_come_by_sample_and_by_grader(study):
    verdicts = measured_verdicts(*study, 0)
    assert len(verdicts) == 3 * 4 and set(verdicts["kv_budget"]) == {2500, 3000, math.inf}
    one = verdicts[verdicts["kv_budget"] == 2500]
    assert list(zip(one["problem"], one["sample"], one["correct"], strict=True)) == [
        ("chain-a/0", 0, True),
        ("chain-a/0", 1, True),
        ("chain-a/1", 0, False),
        ("chain-a/1", 1, True),
    ]
    assert measured_verdicts(*study, 0, "strict")["correct"].sum() == 3 * 2


def test_a_missing_cell_is_refused_by_name_unless_allowed(study):
    grid, folder = study
    (folder / "chain-a/dynts/b3000/s0/record.json").unlink()
    said = r"1 of 3 cells missing in .*: chain-a/dynts/b3000/s0\. .*`make sweep PROFILE=tiny SEED=0`"
    with pytest.raises(IncompleteError, match=said):
        measured_verdicts(grid, folder, 0)
    assert set(measured_verdicts(grid, folder, 0, allow_incomplete=True)["kv_budget"]) == {2500, math.inf}


def test_a_record_without_verdicts_is_named_with_the_next_step(study):
    grid, folder = study
    cell = grid.cells(0)[0]
    publish(folder / cell.cell_path, {"fingerprint": "f", "config": cell.parameters(), "results": {}})
    with pytest.raises(RecordError, match=r"b2500/s0/record.json holds no verdicts.*Move it away"):
        measured_verdicts(grid, folder, 0)


def test_the_exact_checker_of_the_chains_is_not_the_strict_grader():
    grid = load_grid(ROOT / "notebooks" / "tiny.yml")
    with pytest.raises(ConfigError, match="no verdicts by the strict rules"):
        measured_cells(grid, ROOT / "results" / "tiny" / "records", 0, "strict")


@pytest.mark.parametrize(
    "name, title",
    [
        ("tiny", "Tiny-0.8M"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B@916b56a", "R1-Qwen"),
        ("/models/DeepSeek-R1-Distill-Llama-8B/", "R1-Llama"),
        ("owner/Other-1B", "Other-1B"),
        ("../runs/tiny-model-s8/weights", "Tiny-0.8M, training seed 8"),
    ],
)
def test_models_have_the_names_of_the_published_charts(name, title):
    assert model_title(name) == title


def test_what_n_can_tell_is_computed_from_n():
    cells = pd.DataFrame({"dataset": ["AIME24", "AIME25", "GPQA-D"], "n_problems": [30, 30, 198], "n_samples": 1})
    small, large = what_n_tells(cells)
    assert small.startswith("AIME24, AIME25: n = 30 problems, 1 sample each.")
    assert "±17 points" in small and "at least 6 problems" in small and "20 points" in small and "36 points" in small
    assert large.startswith("GPQA-D: n = 198") and "±7 points" in large and "3 points" in large
    assert "±17 points (±8 if a problem's samples were independent)" in what_n_tells(cells.assign(n_samples=5))[0]
