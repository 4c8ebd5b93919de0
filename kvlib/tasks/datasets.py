"""Problems by name: embedded chains of rising difficulty, benchmarks from the hub, a file of one's own, a generator."""

import functools
import hashlib
import importlib.metadata
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvlib.config import check_names
from kvlib.errors import ConfigError
from kvlib.files import file_sha256
from kvlib.tasks import gym
from kvlib.tasks.answers import solution_answer
from kvlib.tasks.chains import make_chain
from kvlib.tasks.rows import SUFFIXES, read_rows

N_PROBLEMS = 200
TUNE_SUFFIX = "-tune"
ONES_OWN = (f"the path of a file ({', '.join(SUFFIXES)})", f"{gym.PREFIX}<generator>?<settings>")
"""What may be given in the place of a name that kvlib knows."""


@dataclass(frozen=True)
class Problem:
    """id "chain-a/12"; question: prompt text; answer: what a right output must give.

    kind says how an output is graded: "chain" exactly, "math" as a number or expression, "choice" as a letter, "sum"
    (to learn on) as a stated number. choices: the options of a choice in the order asked (answer "A" means the first);
    the question lists them already. scorer: the dataset's own judge of an answer, None if its time runs out; where
    answer is empty, only it knows the right ones.
    """

    id: str
    question: str
    answer: str
    kind: str = "chain"
    choices: tuple[str, ...] = ()
    scorer: Callable[[str], bool | None] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ChainDataset:
    """Chains of min_steps to max_steps steps; level_weights: how often a step has 1, 2, 3, 4 operators."""

    title: str
    min_steps: int
    max_steps: int
    level_weights: tuple[float, float, float, float]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of n_problems: one file of one revision of a dataset on the hub, known by its sha256.

    hub_id is None where no revision's bytes were seen: it is read from a file only. rows: hashes of its problems.
    """

    title: str
    n_problems: int
    hub_id: str | None = None
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None
    rows: Sequence[str] = ()


CHAINS = {
    "chain-a": ChainDataset("Chain-A", 4, 10, (1.0, 0.0, 0.0, 0.0)),
    "chain-b": ChainDataset("Chain-B", 5, 11, (0.8, 0.1, 0.1, 0.0)),
    "chain-c": ChainDataset("Chain-C", 5, 12, (0.6, 0.15, 0.22, 0.03)),
    "chain-d": ChainDataset("Chain-D", 6, 12, (0.5, 0.15, 0.25, 0.1)),
}
# docs/DATA.md says where each revision and hash comes from.
BENCHMARKS = {
    name: Benchmark(**found)
    for name, found in json.loads(Path(__file__).with_name("benchmarks.json").read_text()).items()
}
QUESTION_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "expected_answer", "final_answer", "solution")
OPTION_COLUMNS = ("options", "choices", "a", "option_a", "choice_a")
GPQA_COLUMNS = ("correct answer", "incorrect answer 1", "incorrect answer 2", "incorrect answer 3")
WORKED = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])|####")  # an answer that comes with its working
LETTERS = "ABCDE"
CHOICE_SEED = 0  # of the order in which the options of GPQA are asked


def load_problems(name: str, n_problems: int | None = None) -> list[Problem]:
    """The first n_problems (default all) of a dataset.

    "chain-a" to "chain-d" are reported; "chain-a-tune" and so on are other problems of the same kind, for choosing
    budgets and hyper-parameters. Neither shares a seed with training. "aime24", "aime25", "amc23" and "gpqa-diamond"
    come from the hub (or, offline, from its cache), at a pinned revision and with a pinned sha256. A path ending in
    .jsonl, .json, .csv or .parquet is read as it is: a column problem, question or prompt and a column answer,
    expected_answer, final_answer or solution (which boxes it), or the columns of GPQA's official CSV; a file called
    as a benchmark is (aime24.jsonl, gpqa_diamond.csv) must have as many rows. What that generator makes is
    "reasoning-gym/gsm_symbolic?seed=1&size=100", less what it asks twice.

    Raises ConfigError for an unknown name, more problems than there are, and data that is missing, gated or damaged.
    """
    is_chain = name.removesuffix(TUNE_SUFFIX) in CHAINS
    found = _chains(name) if is_chain else _made(name) if name.startswith(gym.PREFIX) else _read(name)
    if n_problems is not None and not 1 <= n_problems <= len(found):
        raise ConfigError(f"n_problems is {n_problems}; {name} has {len(found)}, use 1 to {len(found)}")
    return found[:n_problems]


def one_problem(name: str, index: int) -> Problem:
    """The problem at this place of a dataset, from 0. Raises ConfigError."""
    found = load_problems(name)
    if not 0 <= index < len(found):
        raise ConfigError(f"{name} has no problem {index}; use 0 to {len(found) - 1}")
    return found[index]


def dataset_title(name: str) -> str:
    """The name on a chart, e.g. "Chain-A" or "AIME24"; needs no data."""
    chain = name.removesuffix(TUNE_SUFFIX)
    if chain in CHAINS:
        return CHAINS[chain].title
    if name.startswith(gym.PREFIX):
        return gym.parsed(name)[0]
    benchmark = _benchmark_of(name)
    return benchmark.title if benchmark else Path(name).stem


def content_sha256(problems: list[Problem], kinds: bool = True) -> str:
    """Hash of ids, questions and answers, and, beyond chains, of kinds and choices, unless these decide nothing."""
    entries = []
    for problem in problems:
        plain = problem.kind == "chain" or not kinds
        fields = ("id", "question", "answer") if plain else ("id", "question", "answer", "kind", "choices")
        entries.append({name: getattr(problem, name) for name in fields})
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def dataset_source(name: str) -> dict:
    """What a record says about where its problems come from.

    source: "kvlib", hub id and revision, or the file's name; sha256 of that file; rows_as_pinned: how many of its
    problems are, word for word and with their answer, the ones whose hashes kvlib ships (None where it ships none).
    Of a generator, reasoning-gym's version and all settings.
    """
    if name.removesuffix(TUNE_SUFFIX) in CHAINS:
        return {"source": "kvlib"}
    if name.startswith(gym.PREFIX):
        version = importlib.metadata.version("reasoning-gym")
        return {"source": f"reasoning-gym {version}", "settings": gym.generated(name)[2]}
    path, benchmark = _fetch(name), _benchmark_of(name)
    pinned = benchmark.rows if benchmark else ()
    return {
        "source": path.name if _is_file(name) else f"{benchmark.hub_id}@{benchmark.revision}",
        "sha256": file_sha256(path),
        "choice_seed": CHOICE_SEED,
        "rows_as_pinned": sum(row_sha256(p) in pinned for p in load_problems(name)) if pinned else None,
    }


def row_sha256(problem: Problem) -> str:
    """Hash of one problem's question and answer."""
    return hashlib.sha256(f"{problem.question}\n{problem.answer}".encode()).hexdigest()


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def is_ones_own(name: str) -> bool:
    """Whether a name is that of a file or of a generator, so of no benchmark that kvlib reports."""
    return _is_file(name) or name.startswith(gym.PREFIX)


def _benchmark_of(name: str) -> Benchmark | None:
    """The benchmark a name or a file's name stands for; None for another file. Raises ConfigError if unknown."""
    if _is_file(name):
        return BENCHMARKS.get(Path(name).stem.replace("_", "-").lower())
    if name not in BENCHMARKS:
        known = [*CHAINS, *(chain + TUNE_SUFFIX for chain in CHAINS), *BENCHMARKS]
        check_names([name], [*known, *ONES_OWN], "dataset")
    return BENCHMARKS[name]


def _chains(name: str) -> list[Problem]:
    chain, split = name.removesuffix(TUNE_SUFFIX), "tune" if name.endswith(TUNE_SUFFIX) else "test"
    spec, problems = CHAINS[chain], []
    for i in range(N_PROBLEMS):
        rng = random.Random(f"{split} {chain} {i}")
        drawn = make_chain(rng, rng.randint(spec.min_steps, spec.max_steps), spec.level_weights)
        problems.append(Problem(f"{name}/{i}", drawn.question, drawn.answer))
    return problems


def _read(name: str) -> list[Problem]:
    """The problems of a benchmark or of a file."""
    benchmark = _benchmark_of(name)
    path = _fetch(name)
    problems = _problems(read_rows(path), Path(name).stem, path)
    if benchmark and len(problems) != benchmark.n_problems:
        raise ConfigError(
            f"{path} has {len(problems)} problems and {benchmark.title} has {benchmark.n_problems}; give the whole "
            "benchmark and choose with n_problems, or give the file another name"
        )
    return problems


def _fetch(name: str) -> Path:
    """The file of a benchmark, from the hub or its cache, or the file that a path names."""
    if _is_file(name):
        if not Path(name).is_file():
            raise ConfigError(f"there is no file {name} (seen from {Path.cwd()}); check the path")
        return Path(name)
    spec = _benchmark_of(name)
    if spec.hub_id is None:
        raise ConfigError(
            f"{name} is read from a file only, as kvlib has seen no revision of it on the hub; set dataset to the path "
            f"of its {spec.n_problems} problems, e.g. ../data/{name}.jsonl (docs/DATA.md says which columns)"
        )
    from kvlib.hub import Source  # takes half a second, and most names are of no benchmark

    path = Source(spec.hub_id, spec.revision, spec.file, "dataset").fetch()
    if file_sha256(path) != spec.sha256:
        raise ConfigError(f"{path} is not the {name} that kvlib knows (its sha256 differs); delete it and run again")
    return path


def _made(name: str) -> list[Problem]:
    """The problems of a generator, numbered as it does; a question it asks again is left out."""
    judge, pairs, _ = gym.generated(name)
    problems = {}
    for i, (question, answer) in enumerate(pairs):
        stated = "" if answer is None else str(answer)
        id = f"{gym.parsed(name)[0]}/{i}"
        problems.setdefault(question, Problem(id, question, stated, "math", scorer=functools.partial(judge.scored, i)))
    return list(problems.values())


def _problems(rows: list[dict], prefix: str, path: Path) -> list[Problem]:
    """Rows to problems "<prefix>/<row>", checked for what is missing, empty or there twice."""
    columns = {str(column).strip().lower(): column for row in reversed(rows) for column in row}
    question = next((columns[name] for name in QUESTION_COLUMNS if name in columns), None)
    answers = [columns[name] for name in ANSWER_COLUMNS if name in columns]
    is_gpqa = question is not None and all(name in columns for name in GPQA_COLUMNS)
    if question is None or not (answers or is_gpqa):
        raise ConfigError(
            f"{path} has the columns {', '.join(map(str, rows[0]))}; needed are one of {', '.join(QUESTION_COLUMNS)} "
            f"and one of {', '.join(ANSWER_COLUMNS)}, or the columns of GPQA's official CSV"
        )
    problems, seen = [], {}
    for i, row in enumerate(rows):
        where = f"{path}: row {i + 1}"
        if is_gpqa:
            options = [_text(row, columns[name], where) for name in GPQA_COLUMNS]
            asked = _text(row, question, where)
            key = str(row.get(columns.get("record id"), "") or "").strip() or asked
            problem = _choice_problem(f"{prefix}/{i}", asked, options, key)
        else:
            answer = next((column for column in answers if row.get(column) is not None), answers[0])
            stated = _text(row, answer, where)
            if answer.strip().lower() == "solution" or WORKED.search(stated):
                stated = solution_answer(stated)
                if not stated:
                    raise ConfigError(f"{where} boxes no answer in the column {answer}; add a column answer")
            problem = Problem(f"{prefix}/{i}", _text(row, question, where), stated, "math")
        if problem.question in seen:
            raise ConfigError(f"{where} asks the same as row {seen[problem.question]}; remove one")
        seen[problem.question] = i + 1
        problems.append(problem)
    if not is_gpqa and all(problem.answer in tuple(LETTERS) for problem in problems):
        apart = next((columns[name] for name in OPTION_COLUMNS if name in columns), None)
        if apart and not all(re.search(r"\bB\b", problem.question) for problem in problems):
            raise ConfigError(f"{path}: the column {apart} is not asked; list the options in {question}, as in B) 42")
        return [replace(problem, kind="choice", choices=tuple(LETTERS)) for problem in problems]
    return problems


def _text(row: dict, column: str, where: str) -> str:
    """A field as text, 27.0 as 27. Raises ConfigError if there is none."""
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not is_text or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{where} has no text in the column {column} but {value!r}; fill it in")
    text = str(value).strip()
    if not text:
        raise ConfigError(f"{where} is empty in the column {column}; fill it in")
    return text


def _choice_problem(id: str, question: str, options: list[str], key: str) -> Problem:
    """A question with its options lettered, in an order drawn from CHOICE_SEED and the row's key.

    options[0] is the right one.
    """
    order = sorted(range(len(options)), key=lambda i: hashlib.sha256(f"{CHOICE_SEED} {key} {i}".encode()).hexdigest())
    choices = tuple(options[i] for i in order)
    lettered = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return Problem(id, f"{question}\n\n{lettered}", LETTERS[order.index(0)], "choice", choices)
