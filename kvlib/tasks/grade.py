"""From outputs to verdicts. Never imports torch."""

import functools

from kvlib.tasks.answers import published_answer, strict_answer, tidy
from kvlib.tasks.chains import extract_answer
from kvlib.tasks.datasets import LETTERS, Problem
from kvlib.tasks.equality import Comparer


def grade(problem: Problem, output: str) -> tuple[str | None, bool]:
    """The extracted answer (None: there is none) and whether it is right. No answer is wrong.

    A chain has an exact checker; a benchmark is graded by the published rules (`kvlib.tasks.answers`), so that it may
    stand beside published results.
    """
    verdict = verdicts(problem, output)
    return verdict["answer"], verdict["correct"]


def verdicts(problem: Problem, output: str, truncated: bool = False) -> dict:
    """What a sample's line says of its answer: answer and correct, as `grade` returns them; of a benchmark also
    strict_answer and strict_correct by the strict rules, and undecided, the graders whose comparison ran out of time
    (which counts as wrong).

    truncated: the output was cut off at its last token, so by the strict rules it has no answer.
    """
    if problem.kind == "chain":
        answer = extract_answer(output)
        return {"answer": answer, "correct": answer == problem.answer}
    is_choice = problem.kind == "choice"
    published = published_answer(output, is_choice)
    strict = None if truncated else strict_answer(output, LETTERS[: len(problem.choices)] if is_choice else "")
    if is_choice:
        right = {"correct": published == problem.answer, "strict_correct": strict == problem.answer}
    else:
        compare = comparer()
        right = {
            "correct": published is not None and compare.as_published(tidy(problem.answer), published),
            "strict_correct": strict is not None and compare.strictly(problem.answer, strict),
        }
    return {
        "answer": published,
        "strict_answer": strict,
        "undecided": [name.removesuffix("correct") + "answer" for name, verdict in right.items() if verdict is None],
        **{name: bool(verdict) for name, verdict in right.items()},
    }


@functools.cache
def comparer() -> Comparer:
    """One for all answers, because its process takes a second to start."""
    return Comparer()
