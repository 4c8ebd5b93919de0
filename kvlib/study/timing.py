"""The timing run of one dataset: throughput against KV budget, nothing beside it. `python -m kvlib.study.timing`."""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from kvlib.cell import build_decoder, check, requests_of
from kvlib.config import Grid, RunConfig, load_grid
from kvlib.engine.meter import Meter
from kvlib.errors import ConfigError
from kvlib.models import Reasoner, load_reasoner
from kvlib.record import cpu_model, fingerprint, provenance, publish
from kvlib.tasks.datasets import load_problems

DEFINITION = "all-inclusive steps"
"""What the charts draw: rows x steps / wall time of the steps, with attention, eviction, sampling and bookkeeping."""

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
    problems = load_problems(config.dataset, config.n_problems)
    requests = requests_of(config, problems, reasoner)
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
        check(cell)
    reasoner = load_reasoner(cells[0].model, cells[0].dtype, cells[0].device)
    for cell in cells:
        measure(cell, reasoner, batch_size, min(n_steps, 32))
    measured: dict[str, list[dict[str, float]]] = {cell.cell_path: [] for cell in cells}
    for repeat in range(repeats):
        for cell in cells if repeat % 2 == 0 else cells[::-1]:
            measured[cell.cell_path].append(measure(cell, reasoner, batch_size, n_steps))
        print(f"timing {dataset}: repeat {repeat + 1} of {repeats}", flush=True)
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
