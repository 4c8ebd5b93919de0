"""What a timing record makes of its rounds; the rounds are made up, no time is judged."""

import contextlib
import dataclasses
import os
import sys
from types import SimpleNamespace

import pytest

from kvlib.config import RunConfig
from kvlib.stats import Ratio
from kvlib.study import timing
from kvlib.study.timing import Round, rows_of, said_of

FULL = RunConfig(model="tiny", dataset="chain-a", policy="full")
BUDGET = RunConfig(model="tiny", dataset="chain-a", policy="dynts", kv_budget=96)
MOODS = (1.0, 5.0, 1.1, 1.0)
"""How slow the machine was in each round."""


def rounds(seconds: float) -> list[Round]:
    return [Round([mood * seconds, 2 * mood * seconds], 0.5, 2 * mood * seconds, 30) for mood in MOODS]


def test_a_mood_of_the_machine_changes_neither_shape_nor_level():
    found = {"full": rounds(1.0), "96": rounds(0.5), "control": rounds(1.0)}
    found = {FULL.cell_path: found["full"], BUDGET.cell_path: found["96"], "control": found["control"]}
    rows = rows_of(found, [BUDGET, FULL], FULL, n_rows=6, n_steps=10)
    assert [(row["kv_budget"], row["definition"]) for row in rows] == [
        (budget, name) for budget in (96, None) for name in ("steps", "forward", "goodput")
    ]
    steps = {row["kv_budget"]: row for row in rows if row["definition"] == "steps"}
    assert steps[96]["ratio"] == dataclasses.asdict(Ratio(2.0, 2.0 / 1.01, 2.02))
    assert steps[None]["median"] == pytest.approx(6 * 10 / 3.0), "of the quieter half of the rounds, the mood is 1"
    assert steps[96]["median"] == 2 * steps[None]["median"]
    assert (steps[96]["low"], steps[96]["high"]) == pytest.approx(
        (steps[96]["median"] / 1.01, steps[96]["median"] * 1.01)
    )
    assert steps[96]["repeats"] == pytest.approx([6 * 10 / (1.5 * mood) for mood in MOODS])
    goodput = next(row for row in rows if row["kv_budget"] is None and row["definition"] == "goodput")
    assert goodput["high"] == pytest.approx(30 / 3.5), "the prefill is in its time"
    for row in rows:
        assert 0 < row["low"] <= row["median"] <= row["high"]


def test_the_ends_of_a_line_are_its_smallest_and_largest_budget():
    cells = [dataclasses.replace(BUDGET, kv_budget=budget) for budget in (136, 96, 196)]
    found = {cell.cell_path: rounds(seconds) for cell, seconds in zip(cells, (0.7, 0.5, 1.0), strict=True)}
    assert timing.ends_of(found, [*cells, FULL])["kv_budgets"] == [96, 196]
    assert timing.ends_of(found, [*cells, FULL])["ratio"] == 2.0
    assert timing.ends_of(found, [cells[0], FULL]) is None


def test_a_run_on_a_busy_machine_says_so_and_how_to_repeat_it():
    ends = {"kv_budgets": [96, 196], "ratio": 1.5, "low": 1.4, "high": 1.6}
    command = "python -m kvlib.study.timing --dataset chain-a"
    said = said_of(Ratio(1.01, 0.99, 1.03), ends, "chain-a", command)
    assert "too busy" not in said and said.endswith("KV budget 96 at 1.500 (1.400 to 1.600) of 196's")
    said = said_of(Ratio(1.2, 1.1, 1.3), ends, "chain-a", command)
    assert "too busy for the line to mean anything" in said and said.endswith("--dataset chain-a")
    assert "1.5" not in said, "no ratio that means nothing"
    alone = said_of(Ratio(1.0, None, None), None, "chain-a", command)
    assert alone.endswith("1.000 (too few rounds for an interval) of its twin's speed")


@pytest.mark.parametrize(("device", "seen"), [("cuda", ["GPU-a"]), ("cpu", [None])])
def test_a_run_on_cuda_holds_a_gpu_that_no_cell_has(monkeypatch, device, seen):
    found, free = [], [True]

    @contextlib.contextmanager
    def leased_gpu():
        free[0] = False
        yield {"CUDA_VISIBLE_DEVICES": "GPU-a"}, ()
        free[0] = True

    def time_dataset(*_):
        found.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        assert free[0] == (device == "cpu")

    monkeypatch.setattr(timing, "leased_gpu", leased_gpu)
    monkeypatch.setattr(timing, "time_dataset", time_dataset)
    monkeypatch.setattr(timing, "load_grid", lambda path: SimpleNamespace(shared={"device": device}))
    monkeypatch.setattr(sys, "argv", ["timing", "--grid", "g.yml", "--dataset", "chain-a", "--folder", "f"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # put back afterwards, whatever the run sets
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    timing.main()
    assert found == seen and free[0]
