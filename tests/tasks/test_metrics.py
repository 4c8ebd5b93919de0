"""pass@k and maj@k equal what all subsets of the samples give; agreement is the grader's own equality."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from kvlib.errors import ConfigError
from kvlib.record import publish
from kvlib.stats import mean_interval, wilson_interval
from kvlib.tasks.datasets import Problem
from kvlib.tasks.grade import verdicts
from kvlib.tasks.metrics import agreement_of, maj_at_k, metrics, pass_at_k


def subsets(marks: str, k: int):
    return list(itertools.combinations(range(len(marks)), k))


def majority(marks: str, right: list[bool], chosen) -> float:
    """The chance that the most frequent answer of these samples is right, a tie decided by lot."""
    votes = Counter(marks[i] for i in chosen if marks[i] != "-")
    tied = [mark for mark in votes if votes[mark] == max(votes.values())]
    return sum(right[marks.index(mark)] for mark in tied) / len(tied) if tied else 0.0


def test_pass_at_k_and_maj_at_k_are_the_mean_over_all_subsets():
    rng = random.Random(0)
    for _ in range(200):
        marks = "".join(rng.choice("abcd-") for _ in range(rng.randint(1, 9)))
        right = [mark in ("a", "b")[: rng.randint(0, 2)] and mark != "-" for mark in marks]
        right = [right[marks.index(mark)] for mark in marks]
        k = rng.randint(1, len(marks))
        every = subsets(marks, k)
        assert maj_at_k(marks, right, k) == pytest.approx(sum(majority(marks, right, s) for s in every) / len(every))
        hit = sum(any(right[i] for i in s) for s in every) / len(every)
        assert pass_at_k(len(marks), sum(right), k) == pytest.approx(hit)
    assert maj_at_k("a" * 40 + "b" * 24, [True] * 40 + [False] * 24, 64) == 1.0
    assert maj_at_k("ab--", [True, False, False, False], 4) == 0.5, "a tie is decided by lot"


def samples_of(gold: str, outputs: list[str]) -> list[dict]:
    problem = Problem("table/0", "?", gold, "math")
    return [{"problem": problem.id, **verdicts(problem, f"</think> {output}")} for output in outputs]


def test_agreement_is_the_graders_own_equality():
    boxed = ["\\frac12", "0.5", "3", "", "3.0", "4", "50"]
    outputs = [f"\\boxed{{{answer}}}" for answer in boxed]
    assert agreement_of(samples_of("0.5", outputs)) == {
        "correct": {"table/0": "aab-bca"},  # fifty is a half in percent, by the published rules
        "strict_correct": {"table/0": "aab-bcd"},
    }
    assert agreement_of(samples_of("7", ["\\boxed{7}"])) == {}, "one sample has nothing to agree with"
    many = agreement_of(samples_of("7", [f"\\boxed{{{n}}}" for n in range(100, 160)]))["correct"]["table/0"]
    assert len(many) == len(set(many)) == 60


def cell(folder, marks: dict[str, str], agreement: dict[str, str] | None = None) -> None:
    n = len(next(iter(marks.values())))
    record = {
        "fingerprint": "f",
        "config": {"model": "m", "dataset": "d", "policy": "full", "kv_budget": None, "seed": 0, "n_samples": n},
        "results": {"n_problems": len(marks)},
        "verdicts": {"correct": marks},
    }
    publish(folder, record | ({"agreement": {"correct": agreement}} if agreement else {}))


def test_a_folder_of_records_gives_a_row_per_metric(tmp_path):
    marks = {"d/0": "1100", "d/1": "0000", "d/2": "1111"}
    cell(tmp_path / "new", marks, {"d/0": "aabb", "d/1": "abc-", "d/2": "aaaa"})
    cell(tmp_path / "old", marks)
    cell(tmp_path / "single", {"d/0": "1", "d/1": "0"})
    found = metrics(tmp_path)
    value = found.set_index([found["folder"].str.rsplit("/", n=1).str[1], "metric"])
    assert value.loc[("new", "pass@2"), "value"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert value.loc[("new", "maj@4"), "value"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert value.loc[("new", "avg@4"), "value"] == pytest.approx(0.5)
    assert set(found.loc[found["folder"].str.endswith("new"), "metric"]) == {
        f"{name}@{k}" for name in ("pass", "maj", "avg") for k in (1, 2, 4)
    }
    assert math.isnan(value.loc[("old", "maj@2"), "value"])
    assert "does not say which samples agree" in value.loc[("old", "maj@2"), "note"]
    assert value.loc[("old", "pass@4"), "value"] == pytest.approx(2 / 3)
    assert value.loc[("single", "maj@1"), "value"] == value.loc[("single", "pass@1"), "value"] == 0.5
    assert found["low"].isna().equals(found["value"].isna())
    assert tuple(value.loc[("new", "pass@4"), ["low", "high"]]) == wilson_interval(2, 3), "each problem is 0 or 1"
    assert tuple(value.loc[("new", "avg@4"), ["low", "high"]]) == mean_interval(np.array([0.5, 0, 1]))[1:]
    assert (found.dropna()["low"] <= found.dropna()["value"]).all() and (found.dropna()["high"] <= 1).all()


def test_what_a_record_does_not_hold_is_said_in_a_sentence(tmp_path):
    cell(tmp_path / "c", {"d/0": "10"})
    with pytest.raises(ConfigError, match=r"k is 3 and .*record.json has 2 samples a problem; use 1 to 2"):
        metrics(tmp_path, [3])
    with pytest.raises(ConfigError, match="holds no verdicts 'strict_correct'"):
        metrics(tmp_path, verdict="strict_correct")
