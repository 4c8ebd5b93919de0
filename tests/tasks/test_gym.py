"""Generators of reasoning-gym: by name and settings, the same every time; their scorers beside the graders."""

import importlib.util

import pytest

from kvlib.errors import ConfigError
from kvlib.tasks import gym
from kvlib.tasks.datasets import content_sha256, dataset_source, dataset_title, load_problems
from kvlib.tasks.grade import verdicts
from kvlib.tasks.training import training_problems

needs_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is an extra")
GSM = "reasoning-gym/gsm_symbolic?seed=1&size=12"


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("reasoning-gym/gcd", ("gcd", {"seed": 0, "size": 500})),
        ("reasoning-gym/gcd?seed=7&size=3", ("gcd", {"seed": 7, "size": 3})),
        (
            "reasoning-gym/x?p=0.5&on=true&of=[1, 2]",
            ("x", {"seed": 0, "size": 500, "p": 0.5, "on": True, "of": [1, 2]}),
        ),
    ],
)
def test_a_name_holds_generator_and_settings(name, parsed):
    assert gym.parsed(name) == parsed
    assert dataset_title(name) == parsed[0]


@pytest.mark.parametrize("name", ["gcd?seed", "gcd?seed=[1", "gcd?seed=1&seed=2", "gcd?day=2026-01-01"])
def test_a_name_that_cannot_be_read_is_refused_without_the_package(name):
    with pytest.raises(ConfigError, match=r"cannot be read .*write it as reasoning-gym/gcd\?seed=1&size=100"):
        load_problems(f"reasoning-gym/{name}")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is not None, reason="it is there")
def test_a_missing_package_is_said_with_its_install():
    with pytest.raises(ConfigError, match=r"needs the package reasoning-gym .*kvlib\[gym\].*--no-deps reasoning-gym"):
        load_problems(GSM)


@needs_gym
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gsm_symbolc?seed=1", "has no generator 'gsm_symbolc'; did you mean gsm_symbolic"),
        ("gsm_symbolic?sed=1", "gsm_symbolic has no setting 'sed'; did you mean seed"),
        ("gsm_symbolic?size=0", "refuses .*size must be positive.*; correct the settings"),
        ("gsm_symbolic?difficulty=hard", "refuses .*; correct the settings"),
        ("composite", "refuses .*at least one dataset"),
    ],
)
def test_a_wrong_generator_or_setting_is_said_in_a_sentence(name, sentence):
    with pytest.raises(ConfigError, match=sentence) as refused:
        load_problems(f"reasoning-gym/{name}")
    assert "\n" not in str(refused.value)


@needs_gym
def test_problems_are_the_same_in_every_process_and_others_under_another_seed():
    problems = load_problems(GSM)
    mark = content_sha256(problems)
    assert len(problems) == 12 and problems[3].id == "gsm_symbolic/3" and problems[3].kind == "math"
    gym.generated.cache_clear()
    assert content_sha256(load_problems(GSM)) == mark
    assert load_problems(GSM, 5) == problems[:5]
    assert content_sha256(load_problems(GSM.replace("seed=1", "seed=2"))) != mark
    source = dataset_source(GSM)
    assert source["source"].startswith("reasoning-gym 0.") and source["settings"]["seed"] == "1"
    assert training_problems(GSM, 4, 0) == training_problems(GSM, 4, 0)
    # From sets, whose order hangs on the hash seed; and a question asked twice is one problem.
    words = "reasoning-gym/isomorphic_strings?seed=1&size=20"
    first = content_sha256(load_problems(words))
    gym.generated.cache_clear()
    assert content_sha256(load_problems(words)) == first
    coins = load_problems("reasoning-gym/coin_flip?seed=1&size=200")
    assert len({problem.question for problem in coins}) == len(coins) < 200


@needs_gym
def test_the_scorer_and_both_graders_agree_on_clean_answers():
    for name in ("gsm_symbolic", "gcd", "basic_arithmetic", "simple_equations", "count_primes", "leg_counting"):
        for problem in load_problems(f"reasoning-gym/{name}?seed=3&size=6"):
            for answer, right in ((problem.answer, True), (f"{problem.answer}1", False)):
                found = verdicts(problem, f"So \\boxed{{{answer}}}.", thinks=False)
                assert {found[f"{who}correct"] for who in ("", "strict_", "scorer_")} == {right}, (problem, found)


@needs_gym
def test_a_generator_of_many_right_answers_is_graded_by_its_scorer_alone():
    hanoi = load_problems("reasoning-gym/propositional_logic?seed=1&size=3")
    assert {problem.answer for problem in hanoi} == {""}
    found = verdicts(hanoi[0], "I see no box", thinks=False)
    assert not found["correct"] and not found["scorer_correct"]


@needs_gym
def test_a_scorer_that_would_run_its_answer_cannot_touch_a_file(tmp_path):
    canary = tmp_path / "canary"
    problem = load_problems("reasoning-gym/countdown?seed=1&size=2")[0]
    for answer in (f"__import__('os').system('touch {canary}')", f"open('{canary}', 'w')"):
        assert problem.scorer(answer) is False
    assert not canary.exists()
    assert problem.scorer(problem.answer) is True
