"""The answer names a KV budget that truly loses more in at most one study of twenty, and says when it cannot tell."""

import math

import numpy as np
import pandas as pd
import pytest

from kvlib.charts.answer import (
    MARGIN,
    answer_table,
    answers,
    critical_z,
    difference_counts,
    loss_bound,
    margin_z,
    needs_table,
    smallest_passing,
)
from kvlib.charts.report import answer_text
from kvlib.errors import ConfigError

SHARE = MARGIN / 100
STUDIES = 2000


def verdicts(right, full=None, dataset="D"):
    """{budget: `[problems, samples]` bool}, and the full cache, as measured_verdicts gives them."""
    rows = []
    for budget, table in {**right, **({} if full is None else {math.inf: full})}.items():
        for (problem, sample), correct in np.ndenumerate(np.asarray(table, bool)):
            rows.append((dataset, float(budget), f"p{problem}", sample, correct))
    return pd.DataFrame(rows, columns=["dataset", "kv_budget", "problem", "sample", "correct"])


def cells(budgets, **columns):
    rows = [{"kv_budget": b, "bytes_per_row": 1024.0 * (b or 400), "pass_at_1": 90.0} for b in [*budgets, None]]
    frame = pd.DataFrame(rows).assign(dataset="D", mean_tokens=200.0, mean_prompt=50.0, **columns)
    return frame.astype({"kv_budget": float})


def answer(right, full=None, margin=MARGIN, memory_gb=None, **columns):
    return answers(verdicts(right, full), cells(right, **columns), margin, memory_gb).iloc[0]


def simulated(rng, n, n_samples, solved, spread, wins):
    """Difference counts `[studies, 6, 2 S + 1]` of six budgets that each truly lose exactly the margin."""
    skill = rng.beta(solved * spread, (1 - solved) * spread, (STUDIES, n, 1)) if spread else solved
    full = rng.random((STUDIES, n, n_samples)) < skill
    lost = (SHARE + wins * (1 - solved)) / solved
    counts = np.zeros((STUDIES, 6, 2 * n_samples + 1), int)
    for budget in range(6):
        flips = rng.random(full.shape)
        right = np.where(full, flips >= lost, flips < wins)
        difference = right.sum(-1) - full.sum(-1) + n_samples
        for value in range(2 * n_samples + 1):
            counts[:, budget, value] = (difference == value).sum(-1)
    return counts


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("n", [60, 100, 200])
@pytest.mark.parametrize(
    "solved, spread, wins", [(1.0, 0, 0), (0.95, 0, 0.02), (0.8, 2, 0.1), (0.5, 1, 0.3), (0.1, 0, 0.03)],
    ids=["all solved", "nearly all", "most", "half", "few"],
)  # fmt: skip
def test_of_simulated_studies_whose_budgets_lose_the_margin_one_in_twenty_names_one(n, n_samples, solved, spread, wins):
    counts = simulated(np.random.default_rng(n + n_samples), n, n_samples, solved, spread, wins)
    wrong = (smallest_passing(counts, SHARE) >= 0).mean()
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / STUDIES)


def test_a_bootstrap_would_name_one_too_often_where_nearly_all_is_solved():
    """Why it is not a bootstrap: where few problems are lost, the resamples know no more losses than these."""
    rng = np.random.default_rng(0)
    lost = rng.binomial(40, SHARE, STUDIES)
    resampled = rng.binomial(40, lost / 40, (1000, STUDIES))
    assert (np.quantile(resampled, 0.95, axis=0) / 40 <= SHARE).mean() > 0.1
    counts = np.stack([lost, 40 - lost, 0 * lost], -1)[:, None]
    assert (smallest_passing(counts, SHARE) >= 0).mean() <= 0.05


def test_budgets_that_lose_nothing_are_mostly_named_and_the_first_that_fails_ends_it():
    n, names = 200, smallest_passing
    same, worse = np.array([2, 196, 2]), np.array([40, 160, 0])
    assert names(np.array([same, same, same]), SHARE) == 0
    assert names(np.array([worse, same, same]), SHARE) == 1
    assert names(np.array([same, worse, same]), SHARE) == 2, "what lies below a failure is not tested"
    assert names(np.array([same, same, worse]), SHARE) == -1
    wins = simulated(np.random.default_rng(1), n, 1, 0.9, 0, 0.2)
    assert (names(wins[:, :1], 0.15) >= 0).mean() > 0.9, "a loss of 5 points under a margin of 15"


@pytest.mark.parametrize("losses, wins, n", [(0, 0, 100), (3, 2, 100), (12, 9, 100), (0, 9, 30), (12, 0, 100)])
def test_the_score_is_tangos(losses, wins, n):
    """Tango 1998: the variance under the hypothesis, at the likeliest share of losses; here by trying them all."""
    lost = np.linspace(SHARE + 1e-9, (1 + SHARE) / 2 - 1e-9, 400_001)
    likely = np.zeros_like(lost)
    for count, share in ((losses, lost), (wins, lost - SHARE), (n - losses - wins, 1 - 2 * lost + SHARE)):
        likely += count * np.log(share) if count else 0
    best = lost[likely.argmax()]
    z = (wins - losses + n * SHARE) / math.sqrt(n * (2 * best - SHARE - SHARE**2))
    counts = np.array([losses, n - losses - wins, wins])
    assert margin_z(counts, np.float64(SHARE)) == pytest.approx(z, abs=1e-4)
    assert (np.diff(margin_z(counts, np.linspace(0.01, 0.5, 20))) > 0).all()
    # Two samples of a problem that always agree are one.
    assert margin_z(np.array([losses, 0, n - losses - wins, 0, wins]), np.float64(SHARE)) == pytest.approx(z, abs=1e-4)


def test_exact_where_nothing_was_lost():
    """With no problem changed the test is (1 - margin)^n <= 5 %: 59 problems can tell 5 points, 58 cannot."""
    assert [smallest_passing(np.array([[0, n, 0]]), SHARE) for n in (58, 59)] == [-1, 0]
    assert math.isinf(critical_z(1, SHARE))
    bound = loss_bound(np.array([[0, 200, 0], [10, 180, 10], [30, 170, 0]]), SHARE)
    assert (np.diff(bound) > 0).all() and 0.01 < bound[0] < 0.02 and bound[2] > 0.15


def test_differences_are_counted_by_problem_and_samples_stay_together():
    full = [[1, 1], [1, 0], [0, 0]]
    budgets, counts = difference_counts(verdicts({16: [[0, 0], [1, 1], [0, 0]], 8: full}, full))
    assert budgets == [8, 16] and counts.tolist() == [[0, 0, 3, 0, 0], [1, 0, 1, 1, 0]]
    with pytest.raises(ConfigError, match="different problems or samples"):
        difference_counts(verdicts({8: full[:2]}, full))


def test_the_sentence_and_the_row_of_a_budget_that_is_named():
    full = np.ones((200, 1))
    worse = np.arange(200)[:, None] >= 30
    row = answer({96: worse, 128: full}, full, throughput=1000.0, batch_size=10)
    assert row["kv_budget"] == 128 and row["n"] == 200
    assert row["sentence"].startswith(
        "D: KV budget 128 is the smallest of 2 that loses at most 5 points (loses 0.0, at "
    )
    assert row["sentence"].endswith("51 % of its mean length of 250 tokens, 128 KiB a sequence against 400.")
    assert row["Sequences in 0.0041 GB"] == "31 : 10"
    # 1000 tokens/s, 200 tokens each, 90 % solved; 31 rows where 10 were timed.
    assert row["Solved per hour in it"] == "16,200 to 50,200 (reckoned) : 16,200 (timed)"
    given = answer({128: full}, full, memory_gb=0.001, throughput=1000.0, batch_size=10)
    assert given["Sequences in 0.001 GB"] == "7 : 2" and "timed" not in given["Solved per hour in it"]
    untimed = answer({128: full}, full)
    assert not any(name.startswith(("Solved", "Sequences")) for name in untimed.index)
    table = answer_table(answers(verdicts({128: full}, full), cells([128])))
    assert table.iloc[0]["KV budget"] == "128" and table.columns[-1] == "In words"


def test_the_terminal_says_what_the_charts_hold(tmp_path):
    assert answer_text(tmp_path) == ""
    found = answers(verdicts({128: np.ones((100, 1))}, np.ones((100, 1))), cells([128]))
    answer_table(found).to_csv(tmp_path / "answer.csv", index=False)
    assert answer_text(tmp_path) == found["sentence"][0]


@pytest.mark.parametrize(
    "right, full, sentence",
    [
        (np.ones((200, 1)), None, "there is no full cache to compare with; run its cell, with full_cache: true"),
        (np.zeros((200, 1)), np.zeros((200, 1)), "the full cache solves 0.0 % of these 200 problems, no more than"),
        (np.ones((1, 1)), np.ones((1, 1)), "these 1 problems cannot tell whether a KV budget loses at most 5"),
        (np.ones((40, 3)), np.ones((40, 3)), "these 40 problems cannot tell whether a KV budget loses at most 5"),
        (np.arange(200)[:, None] >= 30, np.ones((200, 1)), "none of the KV budgets tried is shown to lose at most 5"),
    ],
    ids=["no full cache", "solves none", "one problem", "too few", "loses"],
)  # fmt: skip
def test_where_no_budget_can_be_named_a_sentence_says_why(right, full, sentence):
    row = answer({128: right}, full)
    assert math.isnan(row["kv_budget"]) and f"D: {sentence}" in row["sentence"]


def test_a_study_of_which_only_the_full_cache_is_done_says_so():
    full = np.ones((40, 1))
    assert "no KV budget to compare" in answers(verdicts({}, full), cells([]))["sentence"][0]
    assert needs_table(verdicts({}, full)).iloc[0].to_dict() == {"Dataset": "D", "full cache only": "40", "never": "0"}


def test_several_samples_with_the_full_cache_at_100_percent_are_named_once_problems_suffice():
    assert answer({128: np.ones((100, 4))}, np.ones((100, 4)))["kv_budget"] == 128


@pytest.mark.parametrize(
    "options, message",
    [({"margin": 0}, "margin is 0; give"), ({"margin": -5}, "margin is -5"), ({"margin": 100}, "margin is 100"),
     ({"margin": math.nan}, "margin is nan"), ({"memory_gb": 0}, "memory_gb is 0; give"),
     ({"memory_gb": -1}, "memory_gb is -1")],
)  # fmt: skip
def test_a_margin_or_memory_that_is_not_positive_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        answer({128: np.ones((3, 1))}, np.ones((3, 1)), **options)


def test_problems_are_counted_by_the_smallest_budget_that_solves_them():
    full = [[1], [1], [1], [0]]
    table = needs_table(verdicts({8: [[1], [0], [0], [0]], 16: [[0], [1], [0], [0]]}, full))
    assert table.iloc[0].to_dict() == {"Dataset": "D", "8": "1", "16": "1", "full cache only": "1", "never": "1"}
