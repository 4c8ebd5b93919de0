"""What a study will take: samples, hours, disk and GPU memory, reckoned from its profile before anything starts."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvlib.config import Grid, RunConfig, check_keys
from kvlib.cost import SHAPES, Step, kv_bytes, minimum_bytes, model_bytes
from kvlib.errors import ConfigError
from kvlib.tasks.datasets import dataset_title

ITEMSIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "int8": 4}  # of the last, the cache; weights take less
WORKSPACE_GB = 5
"""GPU memory beside weights and cache: the CUDA context, activations, logits, and a round, which of the policies that
look at keys holds up to 3.3 GB at R1-Llama's shape and 5,000 slots, whatever the batch (counted in tests/bench)."""
BYTES_PER_TOKEN = 5
"""Of a token in samples.jsonl: about 4 characters, some of them escaped."""
BYTES_PER_SAMPLE = 500
BYTES_PER_CELL = 200_000
"""The record, the executed notebook and the log."""


@dataclass(frozen=True)
class Expected:
    """What a profile reckons with; `source` says what of it was measured and what assumed.

    output_tokens: mean tokens of a sample, by dataset; a dataset without is reckoned at max_new_tokens. problems: by
    dataset, where the grid takes all. Speed is either measured, in tokens/s of one cell (decode_rate) and of a timing
    run (timing_rate), or reckoned by `step` from the bytes that the model's shape asks for.
    """

    source: str
    prompt_tokens: int
    output_tokens: dict
    problems: dict = dataclasses.field(default_factory=dict)
    decode_rate: float | None = None
    timing_rate: float | None = None
    step: Step | None = None


@dataclass(frozen=True)
class Cost:
    """One dataset's share. hours: on one worker; most_hours: if every sample ran to max_new_tokens; None: unknown."""

    dataset: str
    n_problems: int | None
    n_cells: int
    n_samples: int | None
    output_tokens: float
    hours: float | None
    most_hours: float | None
    timing_hours: float | None


@dataclass(frozen=True)
class Estimate:
    """Of a whole study: a Cost per dataset, disk_gb for samples and records, and gpu_memory_gb of one cell, or None."""

    costs: list[Cost]
    disk_gb: float
    gpu_memory_gb: float | None


def load_expected(grid: Grid) -> Expected | None:
    """A grid's `expected`, checked; None if it has none. Of other datasets than the grid's it may tell too.

    Raises ConfigError.
    """
    if grid.expected is None:
        return None
    where = f"expected in {grid.path}"
    given = checked_fields(Expected, grid.expected, where)
    if given.get("step") is not None:
        given["step"] = Step(**checked_fields(Step, given["step"], f"step of {where}"))
    for name in ("output_tokens", "problems"):
        if not isinstance(given.get(name, {}), Mapping):
            raise ConfigError(f"{where}: {name} must map datasets to numbers")
    expected = Expected(**given)
    measured = expected.decode_rate and (expected.timing_rate or not grid.timing)
    if bool(measured) == bool(expected.step):
        raise ConfigError(f"{where} needs either step, or decode_rate and, with timing, timing_rate")
    return expected


def checked_fields(kind: type, given, where: str) -> dict:
    """The mapping, if it has the fields of a dataclass and numbers where those are numbers. Raises ConfigError."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    needed = [name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING]
    check_keys(given, needed, [name for name in fields if name not in needed], f"key in {where}")
    for name, value in given.items():
        if fields[name].type in (int, float, float | None) and not (type(value) in (int, float) and value >= 0):
            raise ConfigError(f"{where}: {name}={value!r} must be a number, 0 or more")
    return dict(given)


def mean_live(config: RunConfig, n_prompt: int, n_tokens: int) -> float:
    """Tokens that a row holds on average while it decodes n_tokens after a prompt of n_prompt."""
    if config.kv_budget is None:
        return n_prompt + n_tokens / 2
    policy = built_policy(config.policy, tuple(config.policy_options.items()))
    held, total = n_prompt, 0
    for n_seen in range(n_prompt + 1, n_prompt + n_tokens + 1):
        held += 1
        if held > config.kv_budget:
            held = policy.keep(config.kv_budget, n_prompt, n_seen)
        total += held
    return total / n_tokens


@functools.cache
def built_policy(name: str, options: tuple):
    from kvlib.policies import make_policy  # torch

    return make_policy(name, **dict(options))


@functools.cache
def model_shape(model: str) -> Mapping | None:
    """A model's config.json as a mapping; None where the model is not here and no shape of it is known."""
    known = SHAPES.get(model.split("@")[0])
    if known:
        return known
    from kvlib.models import place_of  # torch

    with contextlib.suppress(ConfigError, OSError, ValueError):
        place = place_of(model)
        folder = place if isinstance(place, Path) else place.cached()
        return folder and json.loads((folder / "config.json").read_text())
    return None


def step_seconds(config: RunConfig, expected: Expected, n_rows: int, n_tokens: float) -> float | None:
    """Of a step of n_rows rows, on average over outputs of n_tokens; None where the model's shape is not known."""
    shape, live = model_shape(config.model), mean_live(config, expected.prompt_tokens, round(n_tokens))
    return shape and expected.step.seconds(shape, ITEMSIZES[config.dtype], n_rows, live)


def decoding_seconds(grid: Grid, cells: Iterable[RunConfig], n_tokens: float | None = None) -> float | None:
    """Of these cells of the grid, one after another, at n_tokens an output or, without, as many as are expected.

    None where a dataset's problems, a model's shape or `expected` are not known.
    """
    expected, problems, seconds = load_expected(grid), known_problems(grid), 0.0
    for config in cells:
        n_samples = problems.get(config.dataset, 0) * config.n_samples
        if not expected or not n_samples:
            return None
        each = n_tokens or expected.output_tokens.get(config.dataset, config.max_new_tokens)
        rate = expected.decode_rate
        if expected.step:
            n_rows = min(config.batch_size, n_samples)
            step = step_seconds(config, expected, n_rows, each)
            rate = step and n_rows * expected.step.live_rows / step
        if rate is None:
            return None
        seconds += n_samples * each / rate
    return seconds


def timing_seconds(config: RunConfig, expected: Expected, timing: dict) -> float | None:
    n_rows, n_steps, repeats = (timing[name] for name in ("batch_size", "n_steps", "repeats"))
    if expected.step is None:
        return repeats * n_rows * n_steps / expected.timing_rate
    step = step_seconds(config, expected, n_rows, n_steps)
    return step and repeats * n_steps * step


def gpu_memory_gb(config: RunConfig, expected: Expected, n_rows: int) -> float | None:
    shape = model_shape(config.model)
    if expected.step is None or shape is None:
        return None
    slots = config.kv_budget + 1 if config.kv_budget else expected.prompt_tokens + config.max_new_tokens
    return model_gb(config) + kv_bytes(shape, ITEMSIZES[config.dtype]) * n_rows * slots / 1e9 + WORKSPACE_GB


def in_hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600


def known_problems(grid: Grid) -> dict[str, int]:
    """How many problems a dataset has in this grid, as far as it tells."""
    n_problems, expected = grid.shared.get("n_problems"), load_expected(grid)
    if n_problems:
        return dict.fromkeys(grid.datasets, n_problems)
    return dict(expected.problems) if expected else {}


def model_gb(config: RunConfig) -> float | None:
    """Of a cell's model, on disk and in memory; None where its shape is not known."""
    shape = model_shape(config.model)
    return shape and model_bytes(shape, ITEMSIZES[config.dtype]) / 1e9


def estimate(grid: Grid, seed: int) -> Estimate:
    """What the whole grid takes on one worker.

    Raises ConfigError for an `expected` that is malformed, or a policy that does not exist.
    """
    expected, problems = load_expected(grid), known_problems(grid)
    cells = grid.cells(seed)
    costs, tokens, samples = [], 0.0, 0
    for dataset in grid.datasets:
        own = [cell for cell in cells if cell.dataset == dataset]
        n_problems = problems.get(dataset)
        n_samples = n_problems * own[0].n_samples if n_problems else None
        most = own[0].max_new_tokens
        each = expected.output_tokens.get(dataset, most) if expected else most
        timing = [timing_seconds(cell, expected, grid.timing) for cell in own] if expected and grid.timing else [None]
        costs.append(
            Cost(
                dataset=dataset,
                n_problems=n_problems,
                n_cells=len(own),
                n_samples=n_samples,
                output_tokens=each,
                hours=in_hours(decoding_seconds(grid, own)),
                most_hours=in_hours(decoding_seconds(grid, own, most)),
                timing_hours=None if None in timing else sum(timing) / 3600,
            )
        )
        tokens += (n_samples or 0) * each * len(own)
        samples += (n_samples or 0) * len(own)
    n_rows = max(cells[0].batch_size, grid.timing["batch_size"] if grid.timing else 0)
    memory = [gpu_memory_gb(cell, expected, n_rows) for cell in cells] if expected else []
    return Estimate(
        costs=costs,
        disk_gb=(tokens * BYTES_PER_TOKEN + samples * BYTES_PER_SAMPLE + len(cells) * BYTES_PER_CELL) / 1e9,
        gpu_memory_gb=max((gb for gb in memory if gb), default=None),
    )


def plan_text(grid: Grid, seed: int, estimate: Estimate, n_workers: int, n_done: int) -> str:
    """The plan as a person reads it: a table of datasets, the total, what it was reckoned with."""
    cells = grid.cells(seed)
    one, expected = cells[0], load_expected(grid)
    budgets = ", ".join([str(budget) for budget in grid.kv_budgets] + ["full cache"] * grid.full_cache)
    policies, seeds = f"policy {grid.shared.get('policy', one.policy)}", f"seed {seed}"
    if grid.comparison:
        policies = f"{len({cell.arm for cell in grid.comparison.cells})} arms"
        seeds = f"seeds {', '.join(str(seed) for seed in sorted({cell.seed for cell in cells}))}"
    samples = f"{one.n_samples} sample{'s' if one.n_samples > 1 else ''} a problem"
    lines = [
        f"study {grid.study} ({grid.path}), {seeds}: {len(cells)} cells, {n_done} of them done",
        f"{', '.join(dict.fromkeys(cell.model for cell in cells))} in {one.dtype} on {one.device}",
        f"{policies}, KV budgets {budgets}",
        f"{samples}, temperature {one.temperature}, top-p {one.top_p}, top-k {one.top_k}, at most {one.max_new_tokens} "
        f"new tokens, batch {one.batch_size}, prompt {one.prompt}",
        "",
        f"{'dataset':<16}{'problems':>9}{'samples':>12}{'tokens each':>13}{'hours':>9}{'at most':>9}{'timing':>9}",
    ]
    for cost in estimate.costs:
        per_cell = "?" if cost.n_samples is None else f"{cost.n_cells} x {cost.n_samples}"
        lines.append(
            f"{label(cost.dataset)[:15]:<16}{cost.n_problems or '?':>9}{per_cell:>12}{cost.output_tokens:>13,.0f}"
            f"{hours(cost.hours):>9}{hours(cost.most_hours):>9}{hours(cost.timing_hours) if grid.timing else '-':>9}"
        )
    unknown = any(cost.hours is None for cost in estimate.costs)
    if expected is None:
        lines += ["", "The file has no `expected`, so hours cannot be reckoned; copy one from another study's file."]
    else:
        of_cells, most, timing = (
            sum(getattr(cost, name) or 0 for cost in estimate.costs) for name in ("hours", "most_hours", "timing_hours")
        )
        wall = of_cells / n_workers + timing
        one_at_a_time = "" if n_workers == 1 else f" ({hours(wall)} h with {n_workers} cells at a time)"
        lines += [
            f"{'total':<16}{'':>34}{hours(of_cells):>9}{hours(most):>9}{hours(timing):>9}",
            "",
            f"hours       {hours(of_cells + timing)} on one worker{one_at_a_time}; {hours(most + timing)} if no sample "
            f"ended before {one.max_new_tokens} tokens" + ("; datasets marked ? come on top" if unknown else ""),
        ]
    lines.append(f"disk        {size(estimate.disk_gb)} of samples and records")
    if "/" in one.model and model_gb(one):
        lines[-1] += f", {size(model_gb(one))} of model"
    if estimate.gpu_memory_gb:
        lines.append(f"GPU memory  {size(estimate.gpu_memory_gb)} a cell")
    if expected and expected.step and model_shape(one.model) and grid.kv_budgets:
        lines.append(f"step        {step_text(grid, seed, estimate, expected)}")
    if expected:
        lines.append(f"source      {' '.join(expected.source.split())}")
    return "\n".join(lines)


def label(dataset: str) -> str:
    """As on the charts; a name that stands for nothing as it is, because the plan lists it as missing."""
    with contextlib.suppress(ConfigError):
        return dataset_title(dataset)
    return dataset


def step_text(grid: Grid, seed: int, estimate: Estimate, expected: Expected) -> str:
    """How the time of a step was reckoned, at the grid's largest budget and longest outputs."""
    cost = max(estimate.costs, key=lambda cost: cost.output_tokens)
    cell = [cell for cell in grid.cells(seed) if cell.dataset == cost.dataset and cell.kv_budget][-1]
    step, live = expected.step, mean_live(cell, expected.prompt_tokens, round(cost.output_tokens))
    shape, itemsize = model_shape(cell.model), ITEMSIZES[cell.dtype]
    weights, token = minimum_bytes(shape, 1, 0, itemsize) / 1e9, kv_bytes(shape, itemsize)
    seconds = step.seconds(shape, itemsize, cell.batch_size, live)
    return (
        f"at KV budget {cell.kv_budget} a row holds {live:,.0f} tokens on average: {step.launch_ms:g} ms + "
        f"({weights:.2f} GB of weights + {cell.batch_size} x {live:,.0f} x {token:,} bytes = "
        f"{token * cell.batch_size * live / 1e9:.1f} GB of cache) / ({step.gb_per_s:,g} GB/s x {step.efficiency:g}) = "
        f"{1000 * seconds:.1f} ms, {cell.batch_size / seconds:,.0f} tokens/s, times {step.live_rows:g} for rows whose "
        "queue has ended"
    )


def hours(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def size(gb: float) -> str:
    return f"{gb:.1f} GB" if gb >= 1 else f"{math.ceil(1000 * gb)} MB"
