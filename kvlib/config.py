"""RunConfig: everything that decides one cell's samples, as flat literals; and the grid of cells as data.

Checks form only: names, types, ranges. Whether a model, dataset or policy exists is for `kvlib.cell.check`.
"""

import dataclasses
import difflib
import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType

import yaml

from kvlib.errors import ConfigError

PROMPTS = ["bare", "boxed"]
DTYPES = ["float32", "float64", "bfloat16", "int8"]
TIMING_KEYS = ["batch_size", "n_steps", "repeats"]
STAGE_LISTS = {"models": "model", "datasets": "dataset", "kv_budgets": "kv_budget", "seeds": "seed"}


def ruled(default, wanted: str, holds: Callable):
    """A field of RunConfig: its default, what it must be in words, and the condition."""
    return field(default=default, metadata={"wanted": wanted, "holds": holds})


@dataclass(frozen=True)
class RunConfig:
    """One cell: model, dataset, policy, KV budget, seed, and how to decode.

    kv_budget is in slots per KV head and layer, None exactly when policy is "full". policy_options holds
    the policy's hyper-parameters and n_sink, n_recent, protect_prompt, buffer. n_problems None means all.
    prompt, of a benchmark: "bare" is the question alone, as published; "boxed" asks for the answer in \\boxed{}.
    Raises ConfigError if a value is ill-typed or out of range; numbers are never guessed from strings.
    """

    model: str = ruled("tiny", "a name or a path", lambda x: x.strip() != "")
    dataset: str = ruled("chain-a", "a name or a path", lambda x: x.strip() != "")
    policy: str = ruled("dynts", "a name such as dynts", lambda x: re.fullmatch(r"[A-Za-z0-9_.-]+", x))
    kv_budget: int | None = ruled(None, "a positive integer (slots)", lambda x: x is None or x > 0)
    policy_options: dict = field(
        default_factory=dict, metadata={"wanted": "a mapping of names to literals", "holds": lambda x: True}
    )
    seed: int = ruled(0, "an integer from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63)
    n_problems: int | None = ruled(None, "a positive integer, or None for all", lambda x: x is None or x > 0)
    n_samples: int = ruled(1, "a positive integer", lambda x: x > 0)
    temperature: float = ruled(0.6, "a finite number, 0 (greedy) or more", lambda x: x >= 0)
    top_p: float = ruled(1.0, "a number above 0, at most 1", lambda x: 0 < x <= 1)
    top_k: int = ruled(0, "an integer, 0 (off) or more", lambda x: x >= 0)
    max_new_tokens: int = ruled(768, "a positive integer (tokens)", lambda x: x > 0)
    batch_size: int = ruled(100, "a positive integer (rows)", lambda x: x > 0)
    dtype: str = ruled("float32", f"one of {', '.join(DTYPES)}", lambda x: x in DTYPES)
    device: str = ruled("cpu", "cpu or cuda (CUDA_VISIBLE_DEVICES chooses the GPU)", lambda x: x in ("cpu", "cuda"))
    threads: int = ruled(1, "a positive integer", lambda x: x > 0)
    prompt: str = ruled("bare", f"one of {', '.join(PROMPTS)}", lambda x: x in PROMPTS)

    def __new__(cls, *values, **named):
        check_names(named, list(RULES), "parameter")  # else a TypeError without the nearest name
        return super().__new__(cls)

    def __post_init__(self):
        for name in RULES:
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        if self.policy == "full" and self.kv_budget is not None:
            raise ConfigError(f"kv_budget={self.kv_budget}: policy full keeps everything; set kv_budget=None")
        if self.policy != "full" and self.kv_budget is None:
            raise ConfigError(f"kv_budget is missing: policy {self.policy} evicts; set kv_budget to the most "
                              "slots a head may hold, e.g. 96, or set policy to full")  # fmt: skip

    @classmethod
    def from_notebook(cls, names: Mapping, *others: str) -> "RunConfig":
        """The config of a notebook's `globals()`. others: what its parameters cell sets beside.

        Raises ConfigError on an unknown name that the parameters cell (which annotates each) or papermill sets.
        """
        injected = "\n".join(source for source in names.get("In", ()) if source.startswith("# Parameters\n"))
        given = [*names.get("__annotations__", ()), *re.findall(r"^(\w+) = ", injected, re.MULTILINE)]
        check_names(given, [*RULES, *others], "parameter")
        return cls(**{name: names[name] for name in given if name in RULES})

    def parameters(self) -> dict:
        """The fields as a dict of literals, ready for JSON or papermill, of which RunConfig(**...) makes the same.

        prompt is left out where it is "bare": it came later, and cells measured before keep their fingerprint.
        """
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if (name, value) != ("prompt", "bare")}

    @property
    def cell_path(self) -> str:
        """The cell's folder inside its study, e.g. chain-a/dynts/b96/s0."""
        budget = "full" if self.kv_budget is None else self.kv_budget
        return f"{folder_name(self.dataset)}/{folder_name(self.policy)}/b{budget}/s{self.seed}"


RULES = {rule.name: rule for rule in dataclasses.fields(RunConfig)}


@dataclass(frozen=True)
class Cell:
    """A cell of a comparison: an arm ("full" without a KV budget); protected: the prompt is never evicted."""

    config: RunConfig
    arm: str
    protected: bool

    @property
    def path(self) -> str:
        """Its folder inside its study."""
        budget = "full" if self.config.kv_budget is None else f"b{self.config.kv_budget}"
        arm = f"{folder_name(self.arm)}{'+prompt' if self.protected else ''}"
        dataset = folder_name(self.config.dataset)
        return f"{folder_name(self.config.model)}/{dataset}/{arm}/{budget}/s{self.config.seed}"


@dataclass(frozen=True)
class Comparison:
    """The part of a grid with arms, a policy and its options each: stages say which of them meet on which cells."""

    stages: dict[str, dict]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """One study, read from `path`: datasets x KV budgets (slots) at one policy, or a comparison of arms.

    timing, None or {batch_size, n_steps, repeats}, asks for a timing run per dataset. `shared` holds the RunConfig
    fields that all cells have in common. expected: what `kvlib.study.plan` reckons its cost with. The cells of a
    comparison are many and short, so workers decode them, without a notebook each; its stages name their seeds.
    """

    path: Path
    study: str
    datasets: list[str]
    kv_budgets: list[int]
    full_cache: bool
    timing: dict | None
    shared: dict
    expected: dict | None = None
    comparison: Comparison | None = None

    def cells(self, seed: int = 0) -> list[RunConfig]:
        """Every cell on this seed's noise: budgets dataset by dataset, full cache last. Of a comparison: all."""
        return list(self.folders(seed).values())

    def folders(self, seed: int = 0) -> dict[str, RunConfig]:
        """The cells by their folder inside the study."""
        if self.comparison:
            return {cell.path: cell.config for cell in self.comparison.cells}
        budgets = [{"kv_budget": budget} for budget in self.kv_budgets]
        if self.full_cache:
            budgets.append({"kv_budget": None, "policy": "full", "policy_options": {}})
        pairs = itertools.product(self.datasets, budgets)
        cells = [RunConfig(**{**self.shared, "dataset": name, "seed": seed, **own}) for name, own in pairs]
        return {cell.cell_path: cell for cell in cells}

    def timings(self, seed: int = 0) -> dict[str, str]:
        """The datasets that are timed, by the folder of the timing run inside the study."""
        return {f"{folder_name(name)}/timing/s{seed}": name for name in self.datasets} if self.timing else {}


def load_grid(path) -> Grid:
    """Read a grid file (YAML); raises ConfigError naming the file, the key and the next step."""
    path = Path(path).absolute()
    near = difflib.get_close_matches(path.name, [found.name for found in path.parent.glob("*.yml")], n=3)
    content = read_yaml(path, "grid", f"did you mean {' or '.join(near)}?" if near else "check --grid")
    try:
        return parse_grid(content, path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's rule would take the last."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str, hint: str):
    """The content of a YAML file. Raises ConfigError saying what cannot be read, where and why, and the hint."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise ConfigError(f"no {what} can be read at {path.absolute()} ({error.strerror}); {hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def parse_grid(content, path: Path) -> Grid:
    """The grid that a grid file's mapping describes. Raises ConfigError naming the key."""
    if not isinstance(content, Mapping):
        raise ConfigError("a grid is a mapping with the keys study, datasets and kv_budgets")
    if "arms" in content or "stages" in content:
        return parse_comparison(content, path)
    shared = [name for name in RULES if name not in ("dataset", "kv_budget", "seed")]
    required = ["study", "datasets", "kv_budgets"]
    check_keys(content, required, ["full_cache", "timing", "expected", *shared], "key")
    if not isinstance(content.get("full_cache", False), bool):
        raise ConfigError(f"full_cache={content['full_cache']!r} must be true or false")
    timing = content.get("timing")
    if timing is not None:
        check_keys(timing, TIMING_KEYS, [], "key of timing")
        for name, value in timing.items():
            checked(f"timing.{name}", value, "n_samples")
    grid = Grid(
        path=path,
        study=checked_study(content["study"]),
        datasets=listed(content, "datasets", "dataset"),
        kv_budgets=listed(content, "kv_budgets", "kv_budget"),
        full_cache=content.get("full_cache", False),
        timing=timing,
        shared={name: content[name] for name in shared if name in content},
        expected=content.get("expected"),
    )
    if not grid.cells():
        raise ConfigError("the grid has no cell; list at least one dataset, and a budget or full_cache: true")
    return grid


def parse_comparison(content: Mapping, path: Path) -> Grid:
    """A grid with arms: every stage's models x arms x datasets x budgets x protection x seeds, each cell once."""
    check_keys(content, ["study", "decoding", "common", "arms", "stages"], ["expected"], "key")
    decoding, arms = content["decoding"], content["arms"]
    for key in ("decoding", "common", "arms", "stages"):
        if not isinstance(content[key], Mapping):
            raise ConfigError(f"{key}={content[key]!r} must be a mapping")
    own = [*STAGE_LISTS.values(), "policy", "policy_options"]
    check_names(decoding, [name for name in RULES if name not in own], "key of decoding")
    for arm, its in arms.items():
        if arm == "full" or not isinstance(its, Mapping) or "policy" not in its:
            raise ConfigError(f"arm {arm!r} must be a mapping with a policy, and not be called full; it is {its!r}")
    cells: dict[str, Cell] = {}
    stages = {}
    for stage, spec in content["stages"].items():
        check_keys(spec, [*STAGE_LISTS, "arms", "protect_prompt"], [], f"key of stage {stage}")
        for arm in listed(spec, "arms") if spec["arms"] != "all" else ():
            if arm not in list(arms):
                raise ConfigError(f"stage {stage} names the arm {arm!r}; known: {', '.join(arms)}")
        if not all(type(value) is bool for value in listed(spec, "protect_prompt")):
            raise ConfigError(f"stage {stage}: protect_prompt={spec['protect_prompt']!r} must list true, false or both")
        for key, name in STAGE_LISTS.items():
            listed(spec, key, name)
        spec = stages[stage] = {**spec, "arms": list(arms) if spec["arms"] == "all" else spec["arms"]}
        for model, dataset, seed in itertools.product(spec["models"], spec["datasets"], spec["seeds"]):
            shared = {**decoding, "model": model, "dataset": dataset, "seed": seed}
            made = [Cell(RunConfig(**shared, policy="full"), "full", False)]
            for arm, protected, budget in itertools.product(spec["arms"], spec["protect_prompt"], spec["kv_budgets"]):
                options = {**content["common"], "protect_prompt": protected, **arms[arm]}
                policy = options.pop("policy")
                config = RunConfig(**shared, policy=policy, kv_budget=budget, policy_options=options)
                made.append(Cell(config, arm, protected))
            for cell in made:
                cells.setdefault(cell.path, cell)
    if not cells:
        raise ConfigError("the comparison has no cell; give a stage at least one model, dataset and seed")

    def used(name: str) -> list:
        return list(dict.fromkeys(value for spec in stages.values() for value in spec[name]))

    comparison = Comparison(stages, tuple(cells.values()))
    return Grid(
        path, checked_study(content["study"]), used("datasets"), sorted(used("kv_budgets")), True, None,
        dict(decoding), content.get("expected"), comparison,
    )  # fmt: skip


def checked_study(name) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"study={name!r} must be a name of letters, digits, - and _ (it names a folder)")
    return name


def check_keys(content, required: list[str], others: list[str], what: str) -> None:
    """Raise ConfigError unless content is a mapping with the required keys, and perhaps others."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"a mapping with the keys {', '.join(required)} is needed, got {content!r}")
    check_names(content, required + others, what)
    for name in required:
        if name not in content:
            raise ConfigError(f"the {what} {name!r} is missing; add it")


def listed(content: Mapping, key: str, name: str = "") -> list:
    """The list under a grid's key, each entry checked as the RunConfig field `name`, if any, none twice."""
    values = content[key]
    if not isinstance(values, list):
        raise ConfigError(f"{key}={values!r} must be a list, e.g. {key}: [{values}]")
    for value in values:
        if value is None:
            raise ConfigError(
                f"{key} has an empty entry; for the full cache set full_cache: true (a comparison has it)"
            )
        if name:
            checked(name, value)
    repeated = [value for value in values if values.count(value) > 1]
    if repeated:
        raise ConfigError(f"{key} lists {repeated[0]!r} twice; remove one")
    return list(values)


def checked(name: str, value, rule: str = ""):
    """The value if it obeys its field's rule, or another's (as a float where one is due), else ConfigError."""
    its = RULES[rule or name]
    types = {float: (float, int), int | None: (int, NoneType)}.get(its.type, (its.type,))
    finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) not in types or not finite or not its.metadata["holds"](value):
        raise ConfigError(f"{name}={value!r} ({type(value).__name__}) must be {its.metadata['wanted']}")
    if name == "policy_options":
        for option, setting in value.items():
            if type(option) is not str or not option.isidentifier():
                raise ConfigError(f"policy_options has the key {option!r}; a key is a name such as n_recent")
            finite = not isinstance(setting, float) or math.isfinite(setting)
            if type(setting) not in (str, int, float, bool, NoneType) or not finite:
                raise ConfigError(f"policy_options.{option}={setting!r} must be a string, a finite number, "
                                  "true, false or None")  # fmt: skip
        return {option: at_home(setting) for option, setting in value.items()}
    if name in ("model", "dataset"):
        return at_home(value)
    return float(value) if float in types else value


def at_home(value):
    """A path in "~" as the shell would give it; any other value as it is."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def check_names(given: Mapping, known: list[str], what: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"unknown {what} {name!r}; {hint}Valid: {', '.join(known)}")


def folder_name(name: str) -> str:
    """The name if it can be a folder, else a cleaned one with a hash, so that no two names share a folder."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        return name
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name).strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
