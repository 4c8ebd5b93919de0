"""The timing run of one dataset: throughput against KV budget, nothing beside it. `python -m kvlib.study.timing`."""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from kvlib.cell import build_decoder, prepare
from kvlib.config import Cell, Grid, RunConfig, load_grid
from kvlib.cost import clock
from kvlib.engine.meter import Meter
from kvlib.errors import ConfigError
from kvlib.files import write_atomically
from kvlib.models import Reasoner, load_reasoner
from kvlib.record import cpu_model, explained, fingerprint, provenance, publish

DEFINITION = "all-inclusive steps"
"""What the charts draw: rows x steps / wall time of the steps, with attention, eviction, sampling and bookkeeping."""

NOISY = 0.2
"""The spread of repeats from which on a timing is said to be noisy."""

UNTIMED = 2
"""Steps before the clock starts; on CUDA they compile and capture what a step is. That of a round, later, is timed."""


def timing_fingerprint(grid: Grid, dataset: str, seed: int) -> str:
    """Hash of what a timing record answers for; speed also depends on the machine, which the record states."""
    cells = [cell.parameters() for cell in grid.cells(seed) if cell.dataset == dataset]
    return fingerprint({"cells": cells, "timing": grid.timing})


def measure(config: RunConfig, reasoner: Reasoner, batch_size: int, n_steps: int) -> dict[str, float]:
    """Decode batch_size rows for exactly n_steps, finished or not, and return tokens per second by three definitions.

    steps: rows * n_steps / wall time of all steps (the headline). forward: the same over forward time only (the
    paper's). goodput: tokens up to the end of each output / wall time with prefill.
    """
    requests = prepare(config).requests
    requests = [requests[i % len(requests)] for i in range(batch_size)]
    meter = Meter(config.device)
    decoder = build_decoder(
        config, reasoner, requests, n_rows=batch_size, max_new_tokens=n_steps + UNTIMED + 1, eos_ids=(), meter=meter
    )
    started = time.perf_counter()
    for row, request in enumerate(requests):
        decoder.admit(row, request)
    for _ in range(UNTIMED):
        decoder.step()
    synchronise(config.device)
    forward = -meter.seconds()["forward"]
    prefilled = time.perf_counter()
    for _ in range(n_steps):
        decoder.step()
    synchronise(config.device)
    ended = time.perf_counter()
    if not decoder.finite:
        raise FloatingPointError(
            f"the model's logits or a policy's scores are not finite in {config.cell_path}; use another dtype"
        )
    ends = torch.isin(decoder.output, torch.tensor(reasoner.eos_ids, device=decoder.output.device)).int()
    useful = torch.where(ends.any(1), ends.argmax(1) + 1, n_steps).sum().item()
    return {
        "steps": batch_size * n_steps / (ended - prefilled),
        "forward": batch_size * n_steps / (forward + meter.seconds()["forward"]),
        "goodput": useful / (ended - started),
    }


def spread(row: dict) -> float:
    """Between the lowest and the highest repeat, as a share of their median."""
    return (row["high"] - row["low"]) / row["median"]


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_model()


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_dataset(grid: Grid, dataset: str, seed: int, folder: Path) -> dict:
    """Measure every budget of the grid `repeats` times, budgets interleaved and each repeat in the other direction.

    Uses all cores (cells are decoded side by side, so they use config.threads). A full cache has room for n_steps
    tokens. Every cell first runs 32 unmeasured steps. Publishes and returns a record with, per budget, the repeats of
    each definition and their median, lowest and highest. Raises ConfigError if the grid asks for no such timing.
    """
    cells = [cell for cell in grid.cells(seed) if cell.dataset == dataset]
    if grid.timing is None or not cells:
        raise ConfigError(f"{grid.path} has no timing: line or no dataset {dataset!r}; add it")
    batch_size, n_steps, repeats = (grid.timing[name] for name in ("batch_size", "n_steps", "repeats"))
    for cell in cells:
        prepare(cell)
    reasoner = load_reasoner(cells[0].model, cells[0].dtype, cells[0].device)
    for cell in cells:
        measure(cell, reasoner, batch_size, min(n_steps, 32))
    measured: dict[str, list[dict[str, float]]] = {cell.cell_path: [] for cell in cells}
    runs = [cell for repeat in range(repeats) for cell in (cells if repeat % 2 == 0 else cells[::-1])]
    started = time.monotonic()
    for done, cell in enumerate(runs, 1):
        measured[cell.cell_path].append(measure(cell, reasoner, batch_size, n_steps))
        took = time.monotonic() - started
        left = f", about {clock(took * (len(runs) - done) / done)} left" if done < len(runs) else ""
        print(f"timing {dataset}: {done} of {len(runs)} runs, {clock(took)}{left}", flush=True)
    command = f"python -m kvlib.study.timing --grid {grid.path.name} --dataset {dataset} --seed {seed}"
    rows = []
    for cell in cells:
        for definition in ("steps", "forward", "goodput"):
            values = [m[definition] for m in measured[cell.cell_path]]
            rows.append(
                {
                    "kv_budget": cell.kv_budget,
                    "definition": definition,
                    "median": statistics.median(values),
                    "low": min(values),
                    "high": max(values),
                    "repeats": values,
                }
            )
    widest = max((row for row in rows if row["definition"] == "steps"), key=spread)
    if spread(widest) > NOISY:
        print(f"timing {dataset}: noisy, its repeats differ by up to {100 * spread(widest):.0f} % of their median, so "
              "smaller differences between KV budgets mean nothing; time it again on an idle machine")  # fmt: skip
    return publish(
        folder,
        {
            "kind": "timing",
            "fingerprint": timing_fingerprint(grid, dataset, seed),
            "config": {**cells[0].parameters(), "kv_budget": None, "policy": grid.shared.get("policy", "dynts")},
            "provenance": {"finished": {**provenance(), "command": command}},
            "timing": {
                **grid.timing,
                "threads": torch.get_num_threads(),
                "device": device_name(cells[0].device),
                "definition": DEFINITION,
            },
            "results": {"throughput": rows},
        },
    )


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
    """Time a step and a round of every arm, interleaved, and write results/costs.json; use all cores, run it alone.

    Each arm decodes 64 rows under costed_cells' config until every row has had a round, then 96 steps are timed. Of
    three repeats in turn: median, lowest and highest microseconds per row of a step (forward and sampling) and of a
    round (scoring, selecting, compacting).
    """
    arms = costed_cells(cells)
    config = next(config for arm, config in arms.items() if arm != "full")
    reasoner = load_reasoner(config.model)
    warm_up = config.kv_budget
    measured: dict[str, list[tuple[float, float | None]]] = {arm: [] for arm in arms}
    for repeat in range(COST_REPEATS + 1):
        for arm, its in arms.items():
            requests = prepare(dataclasses.replace(its, n_problems=COST_ROWS)).requests
            decoder = build_decoder(
                its, reasoner, requests, n_rows=COST_ROWS, max_new_tokens=warm_up + COST_STEPS + 1, eos_ids=()
            )
            for row, request in enumerate(requests):
                decoder.admit(row, request)
            for _ in range(warm_up):
                decoder.step()
            before, decoder.meter = sum(map(len, decoder.rows.rounds_at)), Meter(its.device)
            for _ in range(COST_STEPS):
                decoder.step()
            seconds, rounds = decoder.meter.seconds(), sum(map(len, decoder.rows.rounds_at)) - before
            per_step = 1e6 * (seconds["forward"] + seconds["sample"]) / COST_ROWS / COST_STEPS
            if repeat:  # the first is a warm-up
                measured[arm].append((per_step, 1e6 * seconds["evict"] / rounds if rounds else None))
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
        "repeats": COST_REPEATS, "threads": torch.get_num_threads(), "unit": "microseconds per row",
    }  # fmt: skip
    body = {"setting": setting, "provenance": provenance(), "arms": rows}
    with explained(results):
        results.mkdir(parents=True, exist_ok=True)
        write_atomically(results / "costs.json", (json.dumps(body, indent=1) + "\n").encode())
    print(f"wrote {results / 'costs.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        time_dataset(load_grid(arguments.grid), arguments.dataset, arguments.seed, arguments.folder)
    except ConfigError as error:
        sys.exit(f"kvlib.study.timing: {error}")


if __name__ == "__main__":
    main()
