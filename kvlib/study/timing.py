"""The timing run of one dataset: throughput against KV budget, by pairs. `python -m kvlib.study.timing`."""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from kvlib import cost
from kvlib.cell import build_decoder, prepare
from kvlib.config import Cell, Grid, RunConfig, load_grid
from kvlib.engine.meter import Meter
from kvlib.engine.paired import Arm, fill, order_of, take_turns, timed, useful_tokens, windows_of
from kvlib.errors import ConfigError
from kvlib.files import write_atomically
from kvlib.models import Reasoner, load_reasoner
from kvlib.record import cpu_model, explained, fingerprint, provenance, publish
from kvlib.stats import Ratio, paired_ratio, too_busy
from kvlib.study.gpus import leased_gpu
from kvlib.study.layout import python

DEFINITION = "all-inclusive steps"
"""What the charts draw: rows x steps / time of the steps, with attention, eviction, sampling and bookkeeping."""
CONTROL = "control"
WARM_UP = 12
"""Unmeasured steps of every arm on a CPU; on CUDA all that is compiled and captured, instead."""


def timing_fingerprint(grid: Grid, dataset: str, seed: int) -> str:
    """Hash of what a timing record answers for; speed also depends on the machine, which the record states."""
    cells = [cell.parameters() for cell in grid.cells(seed) if cell.dataset == dataset]
    return fingerprint({"cells": cells, "timing": grid.timing})


@dataclass(frozen=True)
class Round:
    """One arm's way through all steps of a round. seconds: of each window; useful: tokens that goodput counts."""

    seconds: list[float]
    prefill: float
    forward: float
    useful: int


def one_round(arms: dict[str, Arm], windows: list[int], number: int, reasoner: Reasoner, clock) -> dict[str, Round]:
    """Start all arms, and have them decode the same steps in turns."""
    device = str(reasoner.model.device)
    prefill = {name: timed(arm.start, device, clock) for name, arm in arms.items()}
    forward = {name: arm.phase_seconds().get("forward", 0.0) for name, arm in arms.items()}
    seconds = take_turns(arms, windows, number, device, clock)
    return {
        name: Round(
            seconds[name],
            prefill[name],
            arm.phase_seconds()["forward"] - forward[name],
            useful_tokens(arm.output(), reasoner.eos_ids),
        )
        for name, arm in arms.items()
    }


def warm_up(arm: Arm, n_steps: int) -> None:
    """Run all that a round will run; on CUDA each graph is captured in its second call, those of rounds too."""
    arm.start()
    if arm.decoder.device.type == "cuda" and arm.decoder.kv_budget is not None:
        for _ in range(3):
            fill(arm.decoder, np.full(len(arm.requests), arm.decoder.kv_budget))
            arm.advance(1)
    else:
        arm.advance(min(n_steps, WARM_UP))


def time_dataset(grid: Grid, dataset: str, seed: int, folder: Path) -> dict:
    """Measure every budget of the grid `repeats` times over the same n_steps, by pairs with the full cache.

    A round starts all arms afresh; on a CPU they stand side by side and advance in windows of a few steps in a
    balanced order, on CUDA, which is leased whole and may not hold all caches at once, one after the other. The full
    cache (the largest budget, in a grid without) is the reference, and the control is a second one. Cells of one
    thread are timed by that thread's processor time, which other processes cannot take; others, and CUDA, by wall time.

    Publishes and returns a record. Per budget and definition: median, low, high and every repeat, in tokens/s. steps is
    the reference's level, of the median of the quieter half of the rounds, times the ratio of its pairs with the
    interval of that (kvlib.stats.paired_ratio); forward (the paper's) counts forward time only, goodput the tokens up
    to the end of each output by the time of all steps and the prefill; these two: median, lowest, highest. timing holds
    the clock, the control and the ends of the line. Raises ConfigError if the grid asks for no such timing.
    """
    cells = [cell for cell in grid.cells(seed) if cell.dataset == dataset]
    if grid.timing is None or not cells:
        raise ConfigError(f"{grid.path} has no timing: line or no dataset {dataset!r}; add it")
    batch_size, n_steps, repeats = (grid.timing[name] for name in ("batch_size", "n_steps", "repeats"))
    for cell in cells:
        prepare(cell)
    reasoner = load_reasoner(cells[0].model, cells[0].dtype, cells[0].device)
    on_cuda = reasoner.model.device.type == "cuda"
    n_threads, one_thread = cells[0].threads, is_one_thread(cells[0])
    clock = clock_of(one_thread)
    names = {cell.cell_path: cell for cell in cells}
    reference = max(cells, key=lambda cell: (cell.kv_budget is None, cell.kv_budget or 0))
    names[CONTROL] = reference

    def build(name: str) -> Arm:
        arm = arm_of(names[name], reasoner, batch_size, n_steps, clock)
        warm_up(arm, n_steps)
        return arm

    found: dict[str, list[Round]] = {name: [] for name in names}
    with threads(n_threads):
        started = time.monotonic()
        for number in range(repeats):
            order = order_of(list(names), number)
            if not on_cuda:
                side_by_side = {name: build(name) for name in order}
                each = one_round(side_by_side, windows_of(n_steps), number, reasoner, clock)
                del side_by_side  # before the next: where in memory an arm lies is worth some percent
            else:
                each = {}
                for name in order:
                    each |= one_round({name: build(name)}, [n_steps], number, reasoner, clock)
            for name, its in each.items():
                found[name].append(its)
            left = (time.monotonic() - started) / (number + 1) * (repeats - number - 1)
            print(f"timing {dataset}: round {number + 1} of {repeats}, about {cost.clock(left)} left", flush=True)
    control = ratio_of(found[CONTROL], found[reference.cell_path])
    ends = ends_of(found, cells)
    again = [python(), "-m", "kvlib.study.timing", "--grid", str(grid.path.absolute()), "--dataset", dataset]
    command = shlex.join([*again, "--seed", str(seed), "--folder", str(Path(folder).absolute())])
    print(said_of(control, ends, dataset, command), flush=True)
    said = f"python -m kvlib.study.timing --grid {grid.path.name} --dataset {dataset} --seed {seed}"  # no one's folders
    return publish(
        folder,
        {
            "kind": "timing",
            "fingerprint": timing_fingerprint(grid, dataset, seed),
            "config": {**cells[0].parameters(), "kv_budget": None, "policy": grid.shared.get("policy", "dynts")},
            "provenance": {"finished": {**provenance(), "command": said}},
            "timing": {
                **grid.timing,
                "threads": n_threads,
                "device": device_name(cells[0].device),
                "definition": DEFINITION,
                "clock": clock_name(one_thread),
                "window": n_steps if on_cuda else windows_of(n_steps)[0],
                "reference": reference.kv_budget,
                "control": {**asdict(control), "too_busy": too_busy(control)},
                "ends": ends,
            },
            "results": {"throughput": rows_of(found, cells, reference, batch_size, n_steps)},
        },
    )


def is_one_thread(config: RunConfig) -> bool:
    return config.device == "cpu" and config.threads == 1


def clock_of(one_thread: bool) -> Callable[[], float]:
    return time.thread_time if one_thread else time.perf_counter


def arm_of(config: RunConfig, reasoner: Reasoner, batch_size: int, n_steps: int, clock: Callable[[], float]) -> Arm:
    """batch_size rows with room for n_steps, finished or not."""
    requests = prepare(config).requests
    requests = [requests[i % len(requests)] for i in range(batch_size)]
    options = {"n_rows": batch_size, "max_new_tokens": n_steps + 1, "eos_ids": ()}
    return Arm(build_decoder(config, reasoner, requests, meter=Meter(config.device, clock), **options), requests)


@contextlib.contextmanager
def threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ratio_of(rounds: list[Round], reference: list[Round]) -> Ratio:
    return paired_ratio([its.seconds for its in rounds], [its.seconds for its in reference])


def ends_of(found: dict[str, list[Round]], cells: list[RunConfig]) -> dict | None:
    """The speed at the smallest KV budget over that at the largest, and which these are; None unless there are two."""
    rounds = {cell.kv_budget: found[cell.cell_path] for cell in cells if cell.kv_budget}
    if len(rounds) < 2:
        return None
    smallest, largest = min(rounds), max(rounds)
    return {"kv_budgets": [smallest, largest], **asdict(ratio_of(rounds[smallest], rounds[largest]))}


def rows_of(found: dict[str, list[Round]], cells: list[RunConfig], reference: RunConfig, n_rows: int, n_steps: int):
    """A row per budget and definition (time_dataset)."""
    totals = np.array([[sum(its.seconds) for its in rounds] for rounds in found.values()]).sum(0)
    quiet = totals <= np.median(totals)
    ours = np.array([its.seconds for its in found[reference.cell_path]])
    level = n_rows * n_steps / np.median(ours[quiet], 0).sum()
    rows = []
    for cell in cells:
        rounds = found[cell.cell_path]
        ratio = Ratio(1.0, 1.0, 1.0) if cell is reference else ratio_of(rounds, found[reference.cell_path])
        low, high = (ratio.ratio if end is None else end for end in (ratio.low, ratio.high))
        speeds = {
            "steps": [n_rows * n_steps / sum(its.seconds) for its in rounds],
            "forward": [n_rows * n_steps / its.forward for its in rounds],
            "goodput": [its.useful / (sum(its.seconds) + its.prefill) for its in rounds],
        }
        for name, values in speeds.items():
            spread = {"median": statistics.median(values), "low": min(values), "high": max(values)}
            if name == "steps":
                spread = {"median": level * ratio.ratio, "low": level * low, "high": level * high}
                spread["ratio"] = asdict(ratio)
            rows.append({"kv_budget": cell.kv_budget, "definition": name, **spread, "repeats": values})
    return rows


def said_of(control: Ratio, ends: dict | None, dataset: str, command: str) -> str:
    """What the control and the ends of the line say of a timing run, for the terminal."""
    text = f"timing {dataset}: the control, equal work, ran at {control} of its twin's speed"
    if too_busy(control):
        return f"{text}: the machine was too busy for the line to mean anything; repeat it with\n{command}"
    if ends is None:
        return text
    smallest, largest = ends["kv_budgets"]
    return f"{text}, KV budget {smallest} at {Ratio.of(ends)} of {largest}'s"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_model()


COST_ROWS, COST_STEPS, COST_REPEATS = 64, 96, 3


def costed_cells(cells: Sequence[Cell]) -> dict[str, RunConfig]:
    """By arm, the cell to time: of the first model, dataset and seed, at the middle of the budgets that all arms have.

    The prompt is protected. Raises ConfigError if the arms have no budget in common.
    """
    key = (cells[0].config.model, cells[0].config.dataset, cells[0].config.seed)
    ours = [cell for cell in cells if (cell.config.model, cell.config.dataset, cell.config.seed) == key]
    evicting = [cell for cell in ours if cell.protected]
    budgets = {arm: {c.config.kv_budget for c in evicting if c.arm == arm} for arm in {c.arm for c in evicting}}
    common = sorted(set.intersection(*budgets.values())) if budgets else []
    if not common:
        raise ConfigError(f"the arms of {key[1]} have no KV budget in common to be timed at; give one stage all arms")
    middle = common[len(common) // 2]
    return {c.arm: c.config for c in ours if c.arm == "full" or (c.protected and c.config.kv_budget == middle)}


def measure_costs(cells: Sequence[Cell], results: Path) -> None:
    """Time a step and a round of every arm, in turns, and write results/costs.json.

    Each arm decodes 64 rows under costed_cells' config until every row has had a round; then, in windows taken in
    turn, come four times 96 steps, the first of them a warm-up. Of the three: median, lowest and highest microseconds
    per row of a step (forward and sampling) and of a round (scoring, selecting, compacting).
    """
    configs = costed_cells(cells)
    config = next(config for arm, config in configs.items() if arm != "full")
    reasoner = load_reasoner(config.model, config.dtype, config.device)
    n_threads, one_thread = config.threads, is_one_thread(config)
    clock = clock_of(one_thread)
    n_steps = config.kv_budget + (COST_REPEATS + 1) * COST_STEPS
    measured: dict[str, list[tuple[float, float | None]]] = {arm: [] for arm in configs}
    with threads(n_threads):
        arms = {}
        for name, its in configs.items():
            arms[name] = arm_of(dataclasses.replace(its, n_problems=COST_ROWS), reasoner, COST_ROWS, n_steps, clock)
            arms[name].start()
            arms[name].advance(config.kv_budget)
        for repeat in range(COST_REPEATS + 1):
            before = {name: (arm.phase_seconds(), n_rounds(arm)) for name, arm in arms.items()}
            take_turns(arms, windows_of(COST_STEPS), repeat, config.device, clock)
            for name, arm in arms.items() if repeat else ():
                now, (then, rounds) = arm.phase_seconds(), before[name]
                step = sum(now[phase] - then[phase] for phase in ("forward", "sample")) / COST_ROWS / COST_STEPS
                rounds = n_rounds(arm) - rounds
                measured[name].append((1e6 * step, 1e6 * (now["evict"] - then["evict"]) / rounds if rounds else None))
            print(f"repeat {repeat} of {COST_REPEATS}", flush=True)
    rows = []
    for arm, values in measured.items():
        row = {"arm": arm}
        for name, numbers in zip(("step", "round"), zip(*values, strict=True), strict=True):
            if None not in numbers:
                row[name] = {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}
        rows.append(row)
    setting = {
        "kv_budget": config.kv_budget, "dataset": config.dataset, "rows": COST_ROWS, "steps": COST_STEPS,
        "repeats": COST_REPEATS, "threads": n_threads, "unit": "microseconds per row",
        "clock": clock_name(one_thread),
    }  # fmt: skip
    body = {"setting": setting, "provenance": provenance(), "arms": rows}
    with explained(results):
        results.mkdir(parents=True, exist_ok=True)
        write_atomically(results / "costs.json", (json.dumps(body, indent=1) + "\n").encode())
    print(f"wrote {results / 'costs.json'}")


def n_rounds(arm: Arm) -> int:
    return sum(map(len, arm.decoder.rows.rounds))


def clock_name(one_thread: bool) -> str:
    return "processor time of one thread" if one_thread else "wall time"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvlib.study.timing", description=__doc__)
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        grid = load_grid(arguments.grid)
        with contextlib.ExitStack() as held:
            if grid.shared.get("device", "cpu").startswith("cuda"):  # nobody else's cell runs on the GPU meanwhile
                environment, _ = held.enter_context(leased_gpu())
                os.environ.update(environment)  # before CUDA is asked for anything
            time_dataset(grid, arguments.dataset, arguments.seed, arguments.folder)
    except ConfigError as error:
        sys.exit(f"kvlib.study.timing: {error}")


if __name__ == "__main__":
    main()
