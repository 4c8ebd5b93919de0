"""Problems that predictors learn on: chains, sums in words, MATH train, or a file of one's own. Knows no model."""

import random
import re

from kvlib.config import check_names
from kvlib.errors import ConfigError
from kvlib.hub import Source
from kvlib.tasks.answers import solution_answer
from kvlib.tasks.chains import make_chain
from kvlib.tasks.datasets import ONES_OWN, Problem, is_ones_own, load_problems
from kvlib.tasks.grade import verdicts
from kvlib.tasks.rows import read_rows

LEVEL_WEIGHTS = (0.7, 0.1, 0.1, 0.1)
MATH = "EleutherAI/hendrycks_math"
MATH_REVISION = "21a5633873b6a120296cce3e2df9d5550074f4a3"
N_MATH = 7500
SUBJECTS = ["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"]
SUBJECTS += ["precalculus"]
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo")
THINGS = ("apples", "books", "stickers", "marbles", "coins", "pencils", "cards", "shells", "stamps", "buttons")


def training_problems(name: str, n: int, seed: int) -> list[Problem]:
    """n problems of a training set, the same for the same seed: "chains" (what the tiny reasoner solves), "sums"
    (made-up arithmetic word problems), "math" (MATH train), or a file or generator as `load_problems` takes it.

    None is in a reported dataset of kvlib. Raises ConfigError for what is unknown, missing or too small.
    """
    if name == "chains":
        return [_chain(i, seed) for i in range(n)]
    if name == "sums":
        return [_sum(i, seed) for i in range(n)]
    if name != "math" and not is_ones_own(name):
        check_names([name], ["chains", "sums", "math", *ONES_OWN], "training set")
    found = math_train() if name == "math" else load_problems(name)
    if n > len(found):
        raise ConfigError(f"n_traces is {n} and training set {name!r} has {len(found)} problems; use at most that")
    return random.Random(f"predictor {name} {seed}").sample(found, n)


def right_answer(problem: Problem, output: str) -> bool:
    """Whether an output gives the problem's answer: as a chain, a sum ("the answer is 7"), a boxed letter or in a box.

    An output without a `</think>` is searched as a whole: whether a trace must think is its profile's to say.
    """
    if problem.kind == "sum":
        stated = re.findall(r"answer is\D{0,3}(\d+)", output)
        return bool(stated) and stated[-1] == problem.answer
    found = verdicts(problem, output, thinks="</think>" in output)
    return found.get("strict_correct", found["correct"])


def _chain(i: int, seed: int) -> Problem:
    rng = random.Random(f"predictor {seed} {i}")
    chain = make_chain(rng, rng.randint(4, 13), LEVEL_WEIGHTS)
    return Problem(f"chains/{i}", chain.question, chain.answer)


def _sum(i: int, seed: int) -> Problem:
    """A story of a start and one or two changes, whole numbers throughout."""
    rng = random.Random(f"predictor sums {seed} {i}")
    (who, friend), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    count = rng.randint(3, 12)
    story = [f"{who} has {count} {thing}."]
    for _ in range(rng.randint(1, 2)):
        kind, n = rng.choice(("gets", "gives", "bags", "doubles")), rng.randint(2, 9)
        if kind == "gives" and count > n:
            count -= n
            story.append(f"{who} gives {n} {thing} to {friend}.")
        elif kind == "bags":
            bags = rng.randint(2, 4)
            count += bags * n
            story.append(f"{who} buys {bags} bags with {n} {thing} in each bag.")
        elif kind == "doubles" and count < 30:
            count *= 2
            story.append(f"Then {who} finds as many {thing} again as {who} has.")
        else:
            count += n
            story.append(f"{who} gets {n} more {thing} from {friend}.")
    return Problem(f"sums/{i}", " ".join([*story, f"How many {thing} does {who} have now?"]), str(count), "sum")


def math_train() -> list[Problem]:
    """The 7,500 problems of MATH train from the hub, at a pinned revision, with what their solutions box."""
    files = [f"{subject}/train-00000-of-00001.parquet" for subject in SUBJECTS]
    rows = [row for file in files for row in read_rows(Source(MATH, MATH_REVISION, file, "dataset").fetch())]
    if len(rows) != N_MATH:
        raise ConfigError(f"MATH train has {len(rows)} problems instead of {N_MATH}; clear the hub's cache")
    # A problem whose solution boxes nothing stays, and no trace of it counts as right.
    answers = [solution_answer(row["solution"]) or "" for row in rows]
    return [Problem(f"math/{i}", rows[i]["problem"], answer, "math") for i, answer in enumerate(answers)]
