"""What a study will take: samples, hours, disk and GPU memory, reckoned from its profile before anything starts."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kvlib.config import TIMING_KEYS, Grid, RunConfig, check_keys
from kvlib.cost import SHAPES, Step, kv_bytes, minimum_bytes, model_bytes
from kvlib.errors import ConfigError
from kvlib.tasks.datasets import dataset_title

ITEMSIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "int8": 4}
"""Bytes of a number in the cache and in a weight as it is loaded, by dtype."""
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
    """One dataset's share. hours: on one worker, NaN if unknown; most_hours: if every sample ran to max_new_tokens."""

    dataset: str
    n_problems: int | None
    n_cells: int
    n_samples: int | None
    output_tokens: float
    hours: float
    most_hours: float
    timing_hours: float


def load_expected(grid: Grid) -> Expected:
    """A grid's `expected`, which may tell of other datasets too; rates of NaN if it has none. Raises ConfigError."""
    if grid.expected is None:
        return Expected("", 0, {}, decode_rate=math.nan, timing_rate=math.nan)
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
    from kvlib.policies import make_policy  # torch

    policy = make_policy(config.policy, **config.policy_options)
    held, total = n_prompt, 0
    for n_seen in range(n_prompt + 1, n_prompt + n_tokens + 1):
        held += 1
        if held > config.kv_budget:
            held = policy.keep(config.kv_budget, n_prompt, n_seen)
        total += held
    return total / n_tokens


@functools.cache
def model_shape(model: str) -> Mapping | None:
    """A model's config.json as a mapping; None where the model is not here and no shape of it is known."""
    known = SHAPES.get(model.split("@")[0])
    if known:
        return known
    from kvlib.models import local_place  # torch

    with contextlib.suppress(ConfigError, OSError, ValueError):
        folder = local_place(model)
        return folder and json.loads((folder / "config.json").read_text())
    return None


def model_gb(config: RunConfig) -> float | None:
    """Of a cell's model, on disk and in memory; None where its shape is not known."""
    shape = model_shape(config.model)
    return shape and model_bytes(shape, ITEMSIZES[config.dtype]) / 1e9


class Plan:
    """What a grid's cells, on one seed's noise, take on one worker. Seconds are NaN where the grid does not tell.

    problems: how many a dataset has, as far as the grid tells. Raises ConfigError for an `expected` that is malformed,
    and, when it reckons, for a policy that does not exist.
    """

    def __init__(self, grid: Grid, seed: int):
        self.grid, self.cells, self.expected = grid, grid.cells(seed), load_expected(grid)
        n_problems = grid.shared.get("n_problems")
        self.problems = dict.fromkeys(grid.datasets, n_problems) if n_problems else self.expected.problems

    def n_samples(self, config: RunConfig) -> int | None:
        n_problems = self.problems.get(config.dataset)
        return n_problems and n_problems * config.n_samples

    def output_tokens(self, config: RunConfig) -> float:
        return self.expected.output_tokens.get(config.dataset, config.max_new_tokens)

    def step_seconds(self, config: RunConfig, n_rows: int, n_tokens: float) -> float:
        """Of a step of n_rows rows, on average over outputs of n_tokens."""
        shape, live = model_shape(config.model), mean_live(config, self.expected.prompt_tokens, round(n_tokens))
        return self.expected.step.seconds(shape, ITEMSIZES[config.dtype], n_rows, live) if shape else math.nan

    def cell_seconds(self, config: RunConfig, n_tokens: float | None = None) -> float:
        """Of decoding a cell, at n_tokens an output or, without, as many as are expected."""
        n_samples, each = self.n_samples(config) or math.nan, n_tokens or self.output_tokens(config)
        rate = self.expected.decode_rate
        if self.expected.step:
            n_rows = min(config.batch_size, n_samples)
            rate = n_rows * self.expected.step.live_rows / self.step_seconds(config, n_rows, each)
        return n_samples * each / rate

    def timing_seconds(self, config: RunConfig) -> float:
        if not self.grid.timing:
            return math.nan
        n_rows, n_steps, repeats = (self.grid.timing[name] for name in TIMING_KEYS)
        if self.expected.step is None:
            return repeats * n_rows * n_steps / self.expected.timing_rate
        return repeats * n_steps * self.step_seconds(config, n_rows, n_steps)

    def costs(self) -> list[Cost]:
        """Of every dataset."""
        costs = []
        for dataset in self.grid.datasets:
            own = [cell for cell in self.cells if cell.dataset == dataset]
            most = own[0].max_new_tokens
            costs.append(
                Cost(
                    dataset=dataset,
                    n_problems=self.problems.get(dataset),
                    n_cells=len(own),
                    n_samples=self.n_samples(own[0]),
                    output_tokens=self.output_tokens(own[0]),
                    hours=sum(map(self.cell_seconds, own)) / 3600,
                    most_hours=sum(self.cell_seconds(cell, most) for cell in own) / 3600,
                    timing_hours=sum(map(self.timing_seconds, own)) / 3600,
                )
            )
        return costs

    def disk_gb(self) -> float:
        """For samples and records, as far as the number of samples is known."""
        n_bytes = BYTES_PER_CELL * len(self.cells)
        for cell in self.cells:
            each = BYTES_PER_TOKEN * self.output_tokens(cell) + BYTES_PER_SAMPLE
            n_bytes += (self.n_samples(cell) or 0) * each
        return n_bytes / 1e9

    def gpu_memory_gb(self) -> float | None:
        """Of the largest cell; None where speed is measured, or no model's shape known."""
        if not self.expected.step:
            return None
        n_rows = max(self.cells[0].batch_size, self.grid.timing["batch_size"] if self.grid.timing else 0)
        found = []
        for cell in self.cells:
            if shape := model_shape(cell.model):
                slots = cell.kv_budget + 1 if cell.kv_budget else self.expected.prompt_tokens + cell.max_new_tokens
                cache = kv_bytes(shape, ITEMSIZES[cell.dtype]) * n_rows * slots / 1e9
                found.append(model_gb(cell) + cache + WORKSPACE_GB)
        return max(found, default=None)

    def text(self, n_workers: int, n_done: int) -> str:
        """As a person reads it: a table of datasets, the total, what it was reckoned with."""
        costs, one = self.costs(), self.cells[0]
        lines = [*self._title(n_done), ""]
        timed, width = bool(self.grid.timing), max(16, 1 + max(len(label(cost.dataset)) for cost in costs))
        lines.append(f"{'dataset':<{width}}{'problems':>9}{'samples':>12}{'tokens each':>13}{'hours':>9}{'at most':>9}"
                     f"{'timing':>9}")  # fmt: skip
        for cost in costs:
            per_cell = "?" if cost.n_samples is None else f"{cost.n_cells} x {cost.n_samples}"
            lines.append(
                f"{label(cost.dataset):<{width}}{cost.n_problems or '?':>9}{per_cell:>12}{cost.output_tokens:>13,.0f}"
                f"{hours(cost.hours):>9}{hours(cost.most_hours):>9}{hours(cost.timing_hours) if timed else '-':>9}"
            )
        if self.grid.expected is None:
            without = "The file has no `expected`, so hours cannot be reckoned; copy one from another study's file."
            lines += ["", without]
        else:
            each = [(cost.hours, cost.most_hours, cost.timing_hours) for cost in costs]
            of_cells, most, timing = np.nansum(each, axis=0)
            unknown = any(math.isnan(cost.hours) for cost in costs)
            wall = of_cells / n_workers + timing
            one_at_a_time = "" if n_workers == 1 else f" ({hours(wall)} h with {n_workers} cells at a time)"
            lines += [
                f"{'total':<{width}}{'':>34}{hours(of_cells):>9}{hours(most):>9}{hours(timing):>9}",
                "",
                f"hours       {hours(of_cells + timing)} on one worker{one_at_a_time}; {hours(most + timing)} if no "
                f"sample ended before {one.max_new_tokens} tokens"
                + ("; datasets marked ? come on top" if unknown else ""),
            ]
        lines.append(f"disk        {size(self.disk_gb())} of samples and records")
        if "/" in one.model and model_gb(one):
            lines[-1] += f", {size(model_gb(one))} of model"
        if memory := self.gpu_memory_gb():
            lines.append(f"GPU memory  {size(memory)} a cell")
        if self.expected.step and model_shape(one.model) and self.grid.kv_budgets:
            lines.append(f"step        {self._step_text(max(costs, key=lambda cost: cost.output_tokens))}")
        if self.expected.source:
            lines.append(f"source      {' '.join(self.expected.source.split())}")
        return "\n".join(lines)

    def _title(self, n_done: int) -> list[str]:
        grid, one, seeds = self.grid, self.cells[0], sorted({cell.seed for cell in self.cells})
        budgets = ", ".join([str(budget) for budget in grid.kv_budgets] + ["full cache"] * grid.full_cache)
        policies = f"policy {grid.shared.get('policy', one.policy)}"
        if grid.comparison:
            policies = f"{len({cell.arm for cell in grid.comparison.cells})} arms"
        return [
            f"study {grid.study} ({grid.path}), {'seeds' if grid.comparison else 'seed'} {', '.join(map(str, seeds))}: "
            f"{len(self.cells)} cells, {n_done} of them done",
            f"{', '.join(dict.fromkeys(cell.model for cell in self.cells))} in {one.dtype} on {one.device}",
            f"{policies}, KV budgets {budgets}",
            f"{one.n_samples} sample{'s' if one.n_samples > 1 else ''} a problem, temperature {one.temperature}, "
            f"top-p {one.top_p}, top-k {one.top_k}, at most {one.max_new_tokens} new tokens, batch {one.batch_size}, "
            f"prompt {one.prompt}",
        ]

    def _step_text(self, cost: Cost) -> str:
        """How the time of a step was reckoned, at the grid's largest budget and a dataset's outputs."""
        cell = [cell for cell in self.cells if cell.dataset == cost.dataset and cell.kv_budget][-1]
        step, live = self.expected.step, mean_live(cell, self.expected.prompt_tokens, round(cost.output_tokens))
        shape, itemsize = model_shape(cell.model), ITEMSIZES[cell.dtype]
        weights, token = minimum_bytes(shape, 1, 0, itemsize) / 1e9, kv_bytes(shape, itemsize)
        seconds = step.seconds(shape, itemsize, cell.batch_size, live)
        return (
            f"at KV budget {cell.kv_budget} a row holds {live:,.0f} tokens on average: {step.launch_ms:g} ms + "
            f"({weights:.2f} GB of weights + {cell.batch_size} x {live:,.0f} x {token:,} bytes = "
            f"{token * cell.batch_size * live / 1e9:.1f} GB of cache) / ({step.gb_per_s:,g} GB/s x "
            f"{step.efficiency:g}) = {1000 * seconds:.1f} ms, {cell.batch_size / seconds:,.0f} tokens/s, times "
            f"{step.live_rows:g} for rows whose queue has ended"
        )


def label(dataset: str) -> str:
    """As on the charts; a name that stands for nothing as it is, because the plan lists it as missing."""
    with contextlib.suppress(ConfigError):
        return dataset_title(dataset)
    return dataset


def hours(value: float) -> str:
    if math.isnan(value):
        return "?"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def size(gb: float) -> str:
    return f"{gb:.1f} GB" if gb >= 1 else f"{math.ceil(1000 * gb)} MB"
