"""Paired differences: exact where they can be, and with intervals that cover and that pairing narrows."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib import stats as paired
from kvlib.errors import ConfigError
from kvlib.stats import (  # fmt: skip
    Ratio,
    differences_to,
    paired_ratio,
    pass_at_1,
    pooled_difference,
    too_busy,
    wilson_interval,
)


def verdicts(correct, **columns):
    """Frame of `correct [problems, samples]`."""
    correct = np.asarray(correct, dtype=bool)
    problem, sample = np.indices(correct.shape)
    return pd.DataFrame({"problem": problem.ravel(), "sample": sample.ravel(), "correct": correct.ravel(), **columns})


def pooled(a, b):
    return SimpleNamespace(**pooled_difference(a, b))


def paired_difference(a, b):
    """Of one cell each."""
    return pooled(a.assign(dataset="", kv_budget=0), b.assign(dataset="", kv_budget=0))


def arrays():
    def pair(shape):
        table = st.lists(st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0],
                         max_size=shape[0])  # fmt: skip
        return st.tuples(table, table)

    return st.tuples(st.integers(1, 12), st.integers(1, 4)).flatmap(pair)


@settings(max_examples=60, deadline=None)
@given(arrays())
def test_swapping_the_arms_turns_the_sign(pair):
    a, b = (verdicts(table) for table in pair)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one.difference == pytest.approx(-other.difference)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert (one.wins, one.losses) == (other.losses, other.wins)
    assert one.difference == pytest.approx(100 * (np.mean(pair[0]) - np.mean(pair[1])))
    assert -100 <= one.low <= one.high <= 100


@settings(max_examples=30, deadline=None)
@given(arrays(), st.randoms())
def test_equal_arms_differ_by_nothing_and_the_order_of_rows_does_not_matter(pair, random):
    a, b = (verdicts(table) for table in pair)
    same = paired_difference(a, a)
    assert (same.difference, same.low, same.high, same.wins, same.losses) == (0, 0, 0, 0, 0)
    order = random.sample(range(len(a)), len(a))
    assert paired_difference(a.iloc[order], b) == paired_difference(a, b)


def test_pairing_narrows_the_interval_of_arms_that_share_their_problems():
    rng = np.random.default_rng(0)
    hardness = rng.random((200, 1))
    noise = rng.random((200, 4))
    a, b = noise < hardness, noise < hardness - 0.05
    paired = paired_difference(verdicts(a), verdicts(b))
    shuffled = paired_difference(verdicts(a), verdicts(rng.permutation(b)))
    assert paired.low > 0 and paired.losses == 0
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)


def test_the_interval_covers_the_true_difference(monkeypatch):
    monkeypatch.setattr(paired, "N_BOOT", 1000)
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        hardness, noise = rng.random((80, 1)), rng.random((80, 4))
        a, b = noise < 0.2 + 0.6 * hardness, noise < 0.1 + 0.6 * hardness
        interval = paired_difference(verdicts(a), verdicts(b))
        covered += interval.low <= 10 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def cells(tables):
    """{(dataset, budget): `[problems, samples]`} as one frame."""
    return pd.concat([verdicts(t, dataset=d, kv_budget=b) for (d, b), t in tables.items()], ignore_index=True)


def test_pooling_weighs_every_cell_the_same_and_keeps_a_problems_budgets_together():
    rng = np.random.default_rng(2)
    once = rng.random((60, 2)) < 0.5
    other = rng.random((60, 2)) < 0.4
    a, b = verdicts(once), verdicts(other)
    repeated = pooled(
        cells({("x", budget): once for budget in (1, 2, 3)}), cells({("x", budget): other for budget in (1, 2, 3)})
    )
    alone = paired_difference(a, b)
    assert repeated.difference == pytest.approx(alone.difference)
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high)), "three copies are no new evidence"

    tables = {(d, k): rng.random((n, 2)) < 0.5 for d, k, n in (("x", 1, 10), ("x", 2, 10), ("y", 1, 40))}
    zero = {cell: np.zeros_like(table) for cell, table in tables.items()}
    several = pooled(cells(tables), cells(zero))
    assert several.difference == pytest.approx(100 * np.mean([table.mean() for table in tables.values()]))
    assert several.n_problems == 50 and several.losses == 0


def test_arms_are_ranked_against_a_baseline():
    rng = np.random.default_rng(3)
    noise = rng.random((100, 4))
    frame = pd.concat(
        [verdicts(noise < share, dataset="x", kv_budget=64, arm=arm) for arm, share in
         {"Random+prompt": 0.5, "Window": 0.3, "R-KV": 0.6, "Same": 0.5}.items()]
    )  # fmt: skip
    table = differences_to(frame, "Random+prompt")
    assert table["arm"].tolist() == ["R-KV", "Same", "Window"]
    assert table["low"][0] > 0 and table["difference"][1] == 0 and table["high"][2] < 0
    with pytest.raises(ConfigError, match="no arm is called 'random'; use one of Random"):
        differences_to(frame, "random")
    with pytest.raises(ConfigError, match=r"Window \(A\) cannot be compared with Random\+prompt \(B\): the arms hold"):
        differences_to(frame[(frame["arm"] != "Window") | (frame["problem"] > 3)], "Random+prompt")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda df: df.drop(columns="correct"), "arm A lack column correct"),
        (lambda df: df.iloc[:0], "arm A lack rows"),
        (lambda df: pd.concat([df, df.iloc[[0]]]), "arm A has a sample twice"),
        (lambda df: df.iloc[1:], "different problems, samples or budgets"),
        (lambda df: df.assign(problem=df["problem"] + 1), "different problems, samples or budgets"),
    ],
    ids=["column", "empty", "twice", "missing", "others"],
)
def test_arms_that_cannot_be_paired_are_refused(change, message):
    frame = verdicts(np.eye(4))
    with pytest.raises(ConfigError, match=message):
        paired_difference(change(frame), frame)


def test_a_hole_in_the_grid_and_an_empty_budget_are_refused():
    frame = cells({("x", 1): np.eye(4), ("x", 2): np.eye(4)})
    with pytest.raises(ConfigError, match="a problem of x lacks one of its KV budgets"):
        pooled_difference(frame.iloc[4:], frame.iloc[4:])
    with pytest.raises(ConfigError, match="give the KV budget it stands beside"):
        pooled_difference(frame.assign(kv_budget=None), frame)


def test_sign_flip_p_is_exact():
    assert paired.sign_flip_p(np.array([1, 1, 1, 1, 1])) == 2 / 32
    assert paired.sign_flip_p(np.array([1, 1, 1, 1, 1, 1, 0, 0])) == 2 / 64
    assert paired.sign_flip_p(np.array([0, 0])) == 1 == paired.sign_flip_p(np.array([1, -1]))
    differences = np.array([3, -1, 2, 5, 0, -2, 4, 1])
    signs = np.array(list(itertools.product([-1, 1], repeat=8)))
    sums = np.abs((signs * np.abs(differences)).sum(1))
    assert paired.sign_flip_p(differences) == pytest.approx((sums >= abs(differences.sum())).mean())


def test_holm_steps_down_and_stops():
    assert paired.holm(np.array([0.04, 0.001, 0.02, 0.5])).tolist() == [False, True, False, False]
    assert paired.holm(np.array([0.03, 0.01, 0.02])).tolist() == [True, True, True]


def verdicts_of(marks: dict) -> pd.DataFrame:
    """{budget: one string of samples per problem}"""
    rows = [
        ("D", budget, problem, sample, mark == "1")
        for budget, problems in marks.items()
        for problem, samples in enumerate(problems)
        for sample, mark in enumerate(samples)
    ]
    return pd.DataFrame(rows, columns=paired.COLUMNS)


def test_budgets_are_compared_problem_by_problem():
    marks = {64.0: ["00"] * 12 + ["10"], 96.0: ["11"] * 9 + ["00"] * 4, math.inf: ["11"] * 12 + ["11"]}
    pairs = paired.budget_differences(verdicts_of(marks)).set_index(["fewer", "more"])
    assert list(pairs.index) == [(64, 96), (64, math.inf), (96, math.inf)]
    first = pairs.loc[64, 96]
    assert first["difference"] == pytest.approx(100 * 8.5 / 13)
    assert (first["wins"], first["losses"], first["n_problems"]) == (9, 1, 13)
    assert first["low"] < first["difference"] < first["high"]
    assert pairs["differs"].tolist() == [True, True, False]  # 4 of 13 changed, all one way: chance does that too
    # The interval of the bootstrap alone would have called it real.
    assert pairs.loc[96, math.inf]["low"] > 0


def test_budgets_on_other_samples_are_not_compared():
    with pytest.raises(ConfigError, match="the budgets of D hold different samples"):
        paired.budget_differences(verdicts_of({64.0: ["1", "0"], 96.0: ["1"]}))
    with pytest.raises(ConfigError, match="lack column"):
        paired.budget_differences(verdicts_of({64.0: ["1"]}).drop(columns="sample"))


def made_rounds(speed: float, n: int, noise: float, seed: int) -> np.ndarray:
    """Seconds `[n, 6]`: windows of unequal work, on a machine that drifts."""
    draw = np.random.default_rng(seed)
    drift = np.linspace(1, 3, n)[:, None]
    return drift * np.arange(1, 7) / speed * draw.normal(1, noise, (n, 6))


def test_a_ratio_of_pairs_is_that_of_the_same_windows_and_its_interval_covers_it():
    covered = 0
    for seed in range(60):
        found = paired_ratio(made_rounds(1.5, 8, 0.03, seed), made_rounds(1.0, 8, 0.03, 1000 + seed))
        assert found.low <= found.ratio <= found.high and found.high - found.low < 0.15
        covered += found.low <= 1.5 <= found.high
    assert covered >= 48, "a 95 % interval from eight rounds"
    same = made_rounds(1.0, 3, 0.1, 0)
    assert paired_ratio(same, same) == Ratio(1.0, 1 / 1.01, 1.01), "what equal runs differ by"


def test_one_round_has_a_ratio_and_no_interval():
    assert paired_ratio([[1.0, 2.0]], [[2.0, 4.0]]) == Ratio(2.0, None, None)
    assert paired_ratio([[1.0], [1.0]], [[2.0], [2.0]]) == Ratio(2.0, None, None), "nor have two numbers"


@pytest.mark.parametrize(
    ("control", "busy"),
    [
        (Ratio(1.0, 0.98, 1.02), False),
        (Ratio(1.02, 0.99, 1.04), False),
        (Ratio(1.02, 1.015, 1.025), True),
        (Ratio(0.96, 0.9, 1.1), True),
        (Ratio(1.04, None, None), True),
        (Ratio(1.01, None, None), False),
    ],
)
def test_a_control_that_is_off_says_that_the_machine_was_too_busy(control, busy):
    assert too_busy(control) is busy


def test_a_control_that_is_off_by_less_than_equal_runs_differ_is_not_busy():
    rounds = made_rounds(1.0, 3, 0.1, 0)
    assert not too_busy(paired_ratio(1.005 * rounds, rounds)), (
        "off by more than its rounds, and by nothing that matters"
    )
    assert too_busy(paired_ratio(1.02 * rounds, rounds))


def test_wilson_interval_is_the_textbook_one():
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_pass_at_1_uses_wilson_at_one_sample_and_clusters_at_several():
    single = [(str(i), i % 4 == 0) for i in range(40)]
    assert pass_at_1(single) == (0.25, *wilson_interval(10, 40))
    clustered = [(str(i), i % 4 == 0) for i in range(40) for _ in range(8)]
    rate, low, high = pass_at_1(clustered)
    assert rate == 0.25
    assert high - low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 40) ** 0.5, rel=0.1), (
        "samples of a problem are not new problems"
    )
    with pytest.raises(ValueError, match="no samples"):
        pass_at_1([])
