"""Problems that predictors learn on: chains, sums in words, MATH train, or a file of one's own. Knows no model."""

import random
import re
from pathlib import Path

from kvlib.errors import ConfigError
from kvlib.tasks.chains import extract_answer, make_chain
from kvlib.tasks.datasets import Problem
from kvlib.tasks.grade import comparer
from kvlib.tasks.rows import read_rows

LEVEL_WEIGHTS = (0.7, 0.1, 0.1, 0.1)
MATH = "EleutherAI/hendrycks_math"
MATH_REVISION = "21a5633873b6a120296cce3e2df9d5550074f4a3"
N_MATH = 7500
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo")
THINGS = ("apples", "books", "stickers", "marbles", "coins", "pencils", "cards", "shells", "stamps", "buttons")


def training_problems(name: str, n: int, seed: int) -> list[Problem]:
    """n problems of a training set, the same for the same seed: "chains" (what the tiny reasoner solves), "sums"
    (made-up arithmetic word problems), "math" (MATH train), or a file of rows with the fields problem and answer.

    None is in a reported dataset of kvlib. Raises ConfigError for what is unknown, missing or too small.
    """
    if name == "chains":
        return [_chain(i, seed) for i in range(n)]
    if name == "sums":
        return [_sum(i, seed) for i in range(n)]
    found = [
        Problem(f"{Path(name).stem}/{i}", entry["problem"], entry["answer"])
        for i, entry in enumerate(math_train() if name == "math" else entries_of(Path(name)))
    ]
    if n > len(found):
        raise ConfigError(f"n_traces is {n} and training set {name!r} has {len(found)} problems; use at most that")
    return random.Random(f"predictor {name} {seed}").sample(found, n)


def right_answer(name: str, problem: Problem, output: str) -> bool:
    """Whether an output gives the problem's answer, by the training set's own way of stating one."""
    if name == "chains":
        return extract_answer(output) == problem.answer
    if name == "sums":
        stated = re.findall(r"answer is\D{0,3}(\d+)", output)
        return bool(stated) and stated[-1] == problem.answer
    stated = boxed(output.rpartition("</think>")[2])
    return stated is not None and comparer().strictly(problem.answer, stated) is True


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
    return Problem(f"sums/{i}", " ".join([*story, f"How many {thing} does {who} have now?"]), str(count))


def math_train() -> list[dict]:
    """The 7,500 problems of MATH train from the hub, at a pinned revision, as problem and boxed answer."""
    try:
        import pandas as pd
        import pyarrow  # noqa: F401
        from huggingface_hub import hf_hub_download

        files = [
            hf_hub_download(
                MATH, f"{subject}/train-00000-of-00001.parquet", repo_type="dataset", revision=MATH_REVISION
            )
            for subject in SUBJECTS
        ]
        frames = [pd.read_parquet(file) for file in files]
    except ImportError as error:
        raise ConfigError(f"MATH train is stored as parquet ({error}); pip install 'kvlib[math]'") from error
    except OSError as error:
        raise ConfigError(
            f"MATH train could not be had from the hub ({str(error).splitlines()[0]}); check the network, or set "
            "problems to a JSONL file with the fields problem and answer"
        ) from error
    # A problem whose solution boxes nothing stays, and no trace of it counts as right.
    entries = [
        {"problem": row.problem, "answer": boxed(row.solution) or ""} for frame in frames for row in frame.itertuples()
    ]
    if len(entries) != N_MATH:
        raise ConfigError(f"MATH train has {len(entries)} problems instead of {N_MATH}; clear the hub's cache")
    return entries


def entries_of(path: Path) -> list[dict]:
    """Problem and answer (or what a solution boxes) of each row of a file. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"unknown training set {str(path)!r}; use 'chains', 'sums', 'math' or the path of a file")
    rows = read_rows(path)
    for row in rows:
        if "problem" not in row or not {"answer", "solution"} & set(row):
            raise ConfigError(f"{path} has a row without the fields problem and answer or solution; name them so")
    return [
        {"problem": str(row["problem"]), "answer": str(row.get("answer", boxed(str(row.get("solution", "")))))}
        for row in rows
    ]


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} (or \boxed x) holds, braces balanced; None if there is none."""
    rest = re.split(r"\\f?box(?:ed)?(?![a-z])\s*", text)[1:]
    if not rest:
        return None
    if not rest[-1].startswith("{"):
        return re.match(r"[^\s$.]*", rest[-1])[0]
    depth = 0
    for i, sign in enumerate(rest[-1]):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[-1][1:i]
    return None
