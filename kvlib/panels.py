"""From a folder of records to the table that kvlib.figures draws. Never imports torch."""

from pathlib import Path

import pandas as pd

from kvlib.config import Grid
from kvlib.datasets import dataset_title
from kvlib.errors import ConfigError
from kvlib.record import RecordError, read_record

POLICY_TITLES = {
    "window": "Window",
    "streaming": "StreamingLLM",
    "random": "Random",
    "h2o": "H2O",
    "tova": "TOVA",
    "snapkv": "SnapKV",
    "rkv": "R-KV",
    "rpc": "RPC",
    "gkv": "G-KV",
    "lazy": "LazyEviction",
    "raas": "RaaS",
    "vase": "VaSE",
    "triattention": "TriAttention",
    "trimkv": "TRIM-KV",
    "dynts": "DynTS",
    "dynts-published": "DynTS as published",
}


def model_title(name: str) -> str:
    """The name on a chart: "Tiny-0.8M" for the embedded model, else the last part of the hub id or path."""
    return "Tiny-0.8M" if name == "tiny" else name.rstrip("/").split("/")[-1]


def expected_cells(grid: Grid, seed: int) -> list[tuple[str, int | None]]:
    """(dataset title, KV budget or None) of every cell, in the order of the panels."""
    return [(dataset_title(cell.dataset), cell.kv_budget) for cell in grid.cells(seed)]


def measured_cells(grid: Grid, records: Path, seed: int) -> pd.DataFrame:
    """One row per finished cell of the grid, with its throughput, in the columns that figures.measured_figure asks for.

    Cells without a record, or of a dataset without a timing record, are left out: measured_figure refuses or marks
    them. Raises RecordError for a damaged record, or one made with other settings than the grid's; ConfigError for a
    grid without timing.
    """
    if grid.timing is None:
        raise ConfigError("the grid asks for no timing, and the charts draw throughput; add a timing: line to it")
    policy = grid.shared.get("policy", "dynts")
    rows = []
    for cell in grid.cells(seed):
        folder = records / cell.cell_path
        timing_folder = records / cell.dataset / "timing" / f"s{seed}"
        if not (folder / "record.json").exists() or not (timing_folder / "record.json").exists():
            continue
        record, timing = read_record(folder), read_record(timing_folder)
        measured = {(row["kv_budget"], row["definition"]): row for row in timing["results"]["throughput"]}
        if record["config"] != cell.parameters() or (cell.kv_budget, "steps") not in measured:
            raise RecordError(f"{folder} was made with other settings than {grid.path} asks for; run the grid again")
        if any(timing["timing"][name] != value for name, value in grid.timing.items()):
            raise RecordError(
                f"{timing_folder} was timed with other settings than {grid.path} asks for; run the grid again"
            )
        results, throughput = record["results"], measured[cell.kv_budget, "steps"]
        rows.append(
            {
                "model": model_title(cell.model),
                "dataset": dataset_title(cell.dataset),
                "policy": POLICY_TITLES.get(policy, policy),
                "kv_budget": cell.kv_budget,
                "pass_at_1": 100 * results["pass_at_1"],
                "pass_low": 100 * results["pass_low"],
                "pass_high": 100 * results["pass_high"],
                "n_problems": results["n_problems"],
                "n_samples": record["config"]["n_samples"],
                "throughput": throughput["median"],
                "throughput_low": throughput["low"],
                "throughput_high": throughput["high"],
                "throughput_definition": f"Throughput (tokens/s, {timing['timing']['definition']})",
                "batch_size": timing["timing"]["batch_size"],
                "device": timing["timing"]["device"],
                "mean_tokens": results["n_tokens"] / results["n_samples"],
                "truncated_share": results["n_truncated"] / results["n_samples"],
                "mean_live_slots": results["mean_live_slots"],
                "peak_slots": results["peak_slots"],
            }
        )
    return pd.DataFrame(rows)
