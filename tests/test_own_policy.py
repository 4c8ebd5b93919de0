"""A policy of one's own meets the published ones of a comparison on their terms."""

from pathlib import Path

import pytest

from kvlib.charts.arms import pareto_figure
from kvlib.compare import beside_published
from kvlib.errors import ConfigError
from kvlib.policies import make_policy

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "notebooks" / "compare.yml", ROOT / "results" / "compare"


def test_a_published_policy_run_as_ones_own_does_on_every_problem_what_was_published(tmp_path):
    terms = {"dataset": "chain-a", "kv_budgets": [196], "rivals": ["recency"], "n_problems": 6}
    policy = make_policy("random", n_sink=4, n_recent=16, buffer=8, protect_prompt=True)
    cells, verdicts = beside_published(policy, "mine", *PUBLISHED, tmp_path, **terms)
    assert set(cells["arm"]) == {"full", "random", "recency", "mine"} and set(cells["n_problems"]) == {6}
    pareto_figure(cells)
    by_arm = {arm: rows.set_index("problem").sort_index() for arm, rows in verdicts.groupby("arm")}
    assert by_arm.keys() == {"mine+prompt", "random+prompt", "recency+prompt"}
    for column in ("correct", "n_tokens", "truncated"):
        assert by_arm["mine+prompt"][column].tolist() == by_arm["random+prompt"][column].tolist()


def test_a_budget_that_the_comparison_has_not_is_refused_in_a_sentence(tmp_path):
    terms = {"dataset": "chain-a", "kv_budgets": [100], "rivals": []}
    with pytest.raises(ConfigError, match=r"has no dataset 'chain-a' at KV budget 100; it has .*chain-a at 196"):
        beside_published(make_policy("random"), "mine", *PUBLISHED, tmp_path, **terms)


def test_the_name_of_a_published_arm_is_refused_because_their_samples_would_be_pooled(tmp_path):
    terms = {"dataset": "chain-a", "kv_budgets": [196], "rivals": [], "n_problems": 2}
    with pytest.raises(ConfigError, match=r"'recency' is an arm of .*compare.yml already; give your"):
        beside_published(make_policy("random"), "recency", *PUBLISHED, tmp_path, **terms)


def test_a_rival_that_the_comparison_has_not_is_refused_with_the_nearest(tmp_path):
    terms = {"dataset": "chain-a", "kv_budgets": [196], "rivals": ["dyntss"], "n_problems": 2}
    with pytest.raises(ConfigError, match=r"unknown rival 'dyntss'; did you mean dynts\?"):
        beside_published(make_policy("random"), "mine", *PUBLISHED, tmp_path, **terms)
