"""From outputs to verdicts. Never imports torch."""

import functools

from kvlib.tasks.answers import published_answer, strict_answer, tidy
from kvlib.tasks.chains import extract_answer
from kvlib.tasks.datasets import LETTERS, Problem
from kvlib.tasks.equality import Comparer, untexted

AFTER_THINKING, WHOLE_OUTPUT = "after </think>", "whole output"  # where the strict rules look


def grade(problem: Problem, output: str) -> tuple[str | None, bool]:
    """The extracted answer (None: there is none) and whether it is right. No answer is wrong.

    A chain has an exact checker; a benchmark is graded by the published rules (`kvlib.tasks.answers`), so that it may
    stand beside published results.
    """
    verdict = verdicts(problem, output)
    return verdict["answer"], verdict["correct"]


def verdicts(problem: Problem, output: str, truncated: bool = False, thinks: bool = True) -> dict:
    """What a sample's line says of its answer: answer and correct, as `grade` returns them; of a benchmark also
    strict_answer and strict_correct by the strict rules, scorer_correct where the dataset has a scorer of its own, and
    undecided, the graders whose comparison ran out of time (which counts as wrong).

    truncated: the output was cut off at its last token, so by the strict rules it has no answer. thinks: the tokenizer
    has a `</think>`; of one without, the strict rules read the whole output, and strict_rule says so.
    """
    if problem.kind == "chain":
        answer = extract_answer(output)
        return {"answer": answer, "correct": answer == problem.answer}
    is_choice = problem.kind == "choice"
    published = published_answer(output, is_choice)
    strict = None if truncated else strict_answer(output, LETTERS[: len(problem.choices)] if is_choice else "", thinks)
    right = {}
    if problem.scorer:
        boxed = None if truncated else strict_answer(output, thinks=thinks, longest=None)
        right["scorer_correct"] = boxed is not None and problem.scorer(untexted(boxed))
    if problem.scorer and not problem.answer:  # one of many answers, known to the scorer alone
        right |= {"correct": right["scorer_correct"], "strict_correct": right["scorer_correct"]}
    elif is_choice:
        right |= {"correct": published == problem.answer, "strict_correct": strict == problem.answer}
    else:
        right |= {
            "correct": published is not None and comparer().as_published(tidy(problem.answer), published),
            "strict_correct": strict is not None and comparer().strictly(problem.answer, strict),
        }
    return {
        "answer": published,
        "strict_answer": strict,
        "undecided": [name.removesuffix("correct") + "answer" for name, verdict in right.items() if verdict is None],
        **{name: bool(verdict) for name, verdict in right.items()},
        **({} if thinks else {"strict_rule": WHOLE_OUTPUT}),
    }


@functools.cache
def comparer() -> Comparer:
    """One for all answers, because its process takes a second to start."""
    return Comparer()
