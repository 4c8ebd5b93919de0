"""Problems by name. The four embedded datasets are chains of rising difficulty, generated from fixed seeds."""

import difflib
import hashlib
import json
import random
from dataclasses import asdict, dataclass

from kvlib.errors import ConfigError
from kvlib.tiny.tasks import make_chain

N_PROBLEMS = 200
TUNE_SUFFIX = "-tune"


@dataclass(frozen=True)
class Problem:
    """id "chain-a/12"; question: prompt text; answer: what a right output must give."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class ChainDataset:
    """Chains of min_steps to max_steps steps; level_weights: how often a step has 1, 2, 3, 4 operators."""

    title: str
    min_steps: int
    max_steps: int
    level_weights: tuple[float, float, float, float]


CHAINS = {
    "chain-a": ChainDataset("Chain-A", 4, 10, (1.0, 0.0, 0.0, 0.0)),
    "chain-b": ChainDataset("Chain-B", 5, 11, (0.8, 0.1, 0.1, 0.0)),
    "chain-c": ChainDataset("Chain-C", 5, 12, (0.6, 0.15, 0.22, 0.03)),
    "chain-d": ChainDataset("Chain-D", 6, 12, (0.5, 0.15, 0.25, 0.1)),
}


def check_dataset(name: str) -> None:
    """Raise ConfigError unless the dataset exists."""
    known = [*CHAINS, *(chain + TUNE_SUFFIX for chain in CHAINS)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown dataset {name!r}{hint} (known: {', '.join(known)})")


def load_problems(name: str, n_problems: int | None = None) -> list[Problem]:
    """The first n_problems (default all) of a dataset.

    "chain-a" to "chain-d" are reported; "chain-a-tune" and so on are other problems of the same kind, for choosing
    budgets and hyper-parameters. Neither shares a seed with training. Raises ConfigError for an unknown name or
    more problems than there are.
    """
    check_dataset(name)
    if n_problems is not None and not 1 <= n_problems <= N_PROBLEMS:
        raise ConfigError(f"n_problems is {n_problems}; {name} has {N_PROBLEMS}, use 1 to {N_PROBLEMS}")
    spec = CHAINS[name.removesuffix(TUNE_SUFFIX)]
    split = "tune" if name.endswith(TUNE_SUFFIX) else "test"
    problems = []
    for i in range(n_problems or N_PROBLEMS):
        rng = random.Random(f"{split} {name.removesuffix(TUNE_SUFFIX)} {i}")
        chain = make_chain(rng, rng.randint(spec.min_steps, spec.max_steps), spec.level_weights)
        problems.append(Problem(f"{name}/{i}", chain.question, chain.answer))
    return problems


def dataset_title(name: str) -> str:
    """The name on a chart, e.g. "Chain-A"."""
    check_dataset(name)
    return CHAINS[name.removesuffix(TUNE_SUFFIX)].title


def content_sha256(problems: list[Problem]) -> str:
    """Hash of ids, questions and answers."""
    canonical = json.dumps([asdict(problem) for problem in problems], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
