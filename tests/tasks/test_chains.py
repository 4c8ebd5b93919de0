"""Datasets are what they were, problems are right, and the checker is exact."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.errors import ConfigError
from kvlib.tasks.chains import NAMES, VOCABULARY, extract_answer, make_chain, solution_words
from kvlib.tasks.datasets import CHAINS, TUNE_SUFFIX, content_sha256, load_problems
from kvlib.tasks.grade import grade

PINNED = {
    "chain-a": "116538d9f5eb6c1ff4234357dc20548e19de6be2b23332a921610a684ddddd85",
    "chain-a-tune": "fb10177ae210c2ae4e50bf20a9476ab122552e50c3e6c68b1b90805c48713342",
    "chain-b": "f6a201cf8bb19b94ba6d2631d25d6e6cd2b265bf3d0233ef36716e1e657797ea",
    "chain-b-tune": "7f19b5fc207a9bf8599358c335a9b5ceacb9f2a8806062b347645131daa17b3a",
    "chain-c": "9c398012c8b679e29f8d829e9a6309fa283d846023fb7a0f911235dca447f5c0",
    "chain-c-tune": "8f726d047e8aeab5c5c8f8aac8174f7d279da5743468eef43edaa1cc831dcd0f",
    "chain-d": "0f079f11bb1e5b7bc70d468bf1e45e0a6dc58a313bc8f6460cedc9d47cef5540",
    "chain-d-tune": "4c0d674e53c9f79a2acb595e8585e9af640abdf635d5e6480dd7c7afd4389a94",
}


def solve(question: str) -> str:
    """An independent solver: reads the question's text only."""
    words = question.split()
    goal = words[-3]
    definitions = [d.split() for d in " ".join(words[:-3]).split(";") if d.strip()]
    values = {name: int(value) for so, name, value in (d for d in definitions if d[0] == "so")}
    for _ in definitions:
        for source, target, *operators in (d for d in definitions if d[0] != "so"):
            needed = {source, *(op[1:] for op in operators if op[1:] in NAMES)}
            if target in values or not needed <= values.keys():
                continue
            value = values[source]
            for op in operators:
                operand = values.get(op[1:]) if op[1:] in NAMES else int(op[1:])
                value = value * operand if op[0] == "*" else value + operand
            values[target] = value % 10
    return str(values[goal])


@pytest.mark.parametrize("name", CHAINS)
def test_answers_agree_with_an_independent_solver(name):
    for problem in load_problems(name):
        assert solve(problem.question) == problem.answer


@pytest.mark.parametrize("name", [*CHAINS, *(name + TUNE_SUFFIX for name in CHAINS)])
def test_datasets_are_pinned_by_content(name):
    problems = load_problems(name)
    assert len(problems) == 200 == len({p.question for p in problems}) == len({p.id for p in problems})
    assert content_sha256(problems) == PINNED[name]


def test_no_reported_problem_is_used_for_tuning_or_labels():
    tests = {p.question for name in CHAINS for p in load_problems(name)}
    tuning = {p.question for name in CHAINS for p in load_problems(name + TUNE_SUFFIX)}
    labels = {
        make_chain(rng, rng.randint(4, 13), (0.7, 0.1, 0.1, 0.1)).question
        for rng in (random.Random(f"predictor 0 {i}") for i in range(480))
    }
    assert not tests & (tuning | labels)


def test_guessing_is_right_one_time_in_ten():
    answers = [p.answer for name in CHAINS for p in load_problems(name)]
    assert max(answers.count(d) for d in set(answers)) / len(answers) < 0.14


@given(st.integers(0, 10**6), st.integers(1, 14))
def test_the_worked_solution_is_in_vocabulary_and_graded_right(seed, n_steps):
    rng = random.Random(seed)
    chain = make_chain(rng, n_steps, (0.25, 0.25, 0.25, 0.25))
    words, is_lookup = solution_words(rng, chain)
    assert len(words) == len(is_lookup)
    assert set(words) | set(chain.question.split()) <= set(VOCABULARY)
    assert extract_answer(" ".join(words)) == chain.answer == solve(chain.question)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("use e ? </think> a 3 , ans 6 <eos>", "6"),
        ("</think> ans 6 <eos>", "6"),
        ("</think> ans 5 <eos> </think> ans 6 <eos>", "6"),
        ("ans 6 <eos>", None),
        ("</think> ans 6", None),
        ("</think> ans 6 <eos> .", None),
        ("</think> ans 16 <eos>", None),
        ("</think> ans six <eos>", None),
        ("</think> ans a <eos>", None),
        ("</think> 6 <eos>", None),
        ("ans 6 <eos> </think>", None),
        ("</think> ans <eos>", None),
        ("", None),
        ("</think>", None),
    ],
)
def test_only_the_exact_form_after_thinking_is_an_answer(output, answer):
    assert extract_answer(output) == answer


def test_no_answer_is_wrong():
    problem = load_problems("chain-a", 1)[0]
    assert grade(problem, "") == (None, False)
    assert grade(problem, f"</think> ans {problem.answer} <eos>") == (problem.answer, True)


def test_unknown_dataset_and_impossible_size_are_refused():
    with pytest.raises(ConfigError, match="unknown dataset 'chain_a'; did you mean chain-a"):
        load_problems("chain_a")
    with pytest.raises(ConfigError, match="use 1 to 200"):
        load_problems("chain-a", 201)
