"""From a folder of records to the tables that charts draw, and what they can tell."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from kvlib.charts.measured import EXACT, PASS, PUBLISHED_RULES, TIMED_COLUMNS, IncompleteError
from kvlib.charts.sheet import policy_title
from kvlib.config import Grid, RunConfig, check_names, folder_name
from kvlib.errors import ConfigError
from kvlib.record import RecordError, read_record
from kvlib.stats import pass_at_1, wilson_interval
from kvlib.tasks.datasets import dataset_title

MODEL_TITLES = {
    "tiny": "Tiny-0.8M",
    "smollm2": "SmolLM2-135M",
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf": "Qwen2.5-Coder-0.5B (Q4_K_M)",
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf": "Qwen2.5-Coder-1.5B (Q4_K_M)",
    "DeepSeek-R1-Distill-Qwen-7B": "R1-Qwen",
    "DeepSeek-R1-Distill-Llama-8B": "R1-Llama",
}
THROUGHPUTS = {"forward": "forward time only, as published", "goodput": "useful tokens over total time"}
GRADERS = {"published": ("", PUBLISHED_RULES), "strict": ("strict_", "strict rules")}


def model_title(name: str) -> str:
    """The name on a chart: short for the profiles' and `make tiny-model`'s, else the end of the hub id or path."""
    last = name.rstrip("/").removesuffix("/weights").split("/")[-1].split("@")[0]
    trained = last.removeprefix("tiny-model-s")
    return f"Tiny-0.8M, training seed {trained}" if trained.isdecimal() else MODEL_TITLES.get(last, last)


def expected_cells(grid: Grid, seed: int) -> list[tuple[str, int | None]]:
    """(dataset title, KV budget or None) of every cell, in the order of the panels."""
    return [(dataset_title(cell.dataset), cell.kv_budget) for cell in grid.cells(seed)]


def measured_cells(
    grid: Grid, records: Path, seed: int, grader: str = "published", throughput: str = "steps"
) -> pd.DataFrame:
    """One row per finished cell of the grid in the columns that measured_figure asks for, and what `answer` needs.

    Intervals are computed here, from the records' verdicts. Without a timing: line in the grid there is no column of
    throughput; a dataset that is not timed yet has NaN there. grader: whose verdicts, "published" or "strict"; embedded
    chains have one exact checker. throughput: "steps", "forward" or "goodput" (kvlib.study.timing.measure).

    Cells without a record are left out: measured_figure refuses or marks them. Raises RecordError for a damaged record,
    or one made with other settings than the grid's; ConfigError for verdicts or a throughput that the records do not
    hold.
    """
    check_names([throughput], ["steps", *THROUGHPUTS], "throughput")
    policy = grid.shared.get("policy", "dynts")
    rows = []
    for cell, record in _finished(grid, records, seed)[0]:
        folder = records / cell.cell_path
        results, cost = record["results"], record["cost"]
        prefix, graded = graded_by(record, grader, folder)
        marks = _marks(record, prefix, folder)
        row = {
            "model": model_title(cell.model),
            "dataset": dataset_title(cell.dataset),
            "policy": policy_title(policy),
            "kv_budget": cell.kv_budget,
            "grader": graded,
            **dict(zip(PASS, _pass_at_1(marks), strict=True)),
            "n_problems": marks["problem"].nunique(),
            "n_samples": cell.n_samples,
            "max_new_tokens": cell.max_new_tokens,
            "device": record["provenance"]["finished"]["cpu"] if cell.device == "cpu" else "a GPU",
            "mean_tokens": results["n_tokens"] / results["n_samples"],
            "mean_prompt": results.get("n_prompt_tokens", math.nan) / results["n_samples"],
            "bytes_per_row": cost["kv_bytes"] / cost["n_rows"] if "kv_bytes" in cost else math.nan,
            "truncated_share": results["n_truncated"] / results["n_samples"],
            "batch_halved": cost.get("batch_halved", False),
        }
        if "strict_correct" in record["verdicts"]:
            row["strict_pass_at_1"] = _pass_at_1(_marks(record, "strict_", folder))[0]
            row["unanswered_share"] = results[f"{prefix}n_unanswered"] / results["n_samples"]
        if grid.timing is not None:
            row |= _speed(grid, records / folder_name(cell.dataset) / "timing" / f"s{seed}", cell, throughput)
        rows.append(row)
    return pd.DataFrame(rows)


def _finished(grid: Grid, records: Path, seed: int) -> tuple[list[tuple[RunConfig, dict]], list[str]]:
    """The grid's finished cells with their records, and the paths of the others.

    Raises RecordError for a record made with other settings.
    """
    found, missing = [], []
    for cell in grid.cells(seed):
        folder = records / cell.cell_path
        if not (folder / "record.json").exists():
            missing.append(cell.cell_path)
            continue
        record = read_record(folder)
        if record["config"] != cell.parameters():
            raise RecordError(f"{folder} was made with other settings than {grid.path} asks for; run the grid again")
        found.append((cell, record))
    return found, missing


def _marks(record: dict, prefix: str, folder: Path) -> pd.DataFrame:
    """The columns problem, sample, correct; a row per sample."""
    marks = record.get("verdicts", {}).get(f"{prefix}correct")
    if marks is None:
        raise RecordError(f"{folder}/record.json holds no verdicts per problem: an older kvlib wrote it. Move it "
                          "away and run the study again: it is rebuilt from its samples")  # fmt: skip
    rows = [(name, i, mark == "1") for name, samples in marks.items() for i, mark in enumerate(samples)]
    return pd.DataFrame(rows, columns=["problem", "sample", "correct"])


def _pass_at_1(marks: pd.DataFrame) -> list[float]:
    """Percent, and its 95 % interval."""
    return [100 * share for share in pass_at_1(zip(marks["problem"], marks["correct"], strict=True))]


def _speed(grid: Grid, folder: Path, cell: RunConfig, throughput: str) -> dict:
    """The columns of a cell's throughput; NaN where the dataset is not timed yet."""
    if not (folder / "record.json").exists():
        return dict.fromkeys(TIMED_COLUMNS, math.nan)
    timing = read_record(folder)
    measured = {(row["kv_budget"], row["definition"]): row for row in timing["results"]["throughput"]}
    asked = all(timing["timing"][name] == value for name, value in grid.timing.items())
    if (cell.kv_budget, throughput) not in measured or not asked:
        raise RecordError(f"{folder} was timed with other settings than {grid.path} asks for; run the grid again")
    speed = measured[cell.kv_budget, throughput]
    definition = THROUGHPUTS.get(throughput, timing["timing"]["definition"])
    clock = timing["timing"].get("clock")  # older records, all by wall time, do not say it
    definition += f", {clock}" if clock else ""
    control, ends = timing["timing"].get("control"), timing["timing"].get("ends")  # older records have none
    return {
        "throughput": speed["median"],
        "throughput_low": speed["low"],
        "throughput_high": speed["high"],
        "throughput_definition": f"Throughput (tokens/s, {definition})",
        "throughput_interval": "95 % of the pairs with the full cache" if "ratio" in speed else "lowest to highest",
        "n_repeats": len(speed["repeats"]),
        "too_busy": control is not None and control["too_busy"],
        "ends_differ": None if not ends or ends["low"] is None else not ends["low"] <= 1 <= ends["high"],
        "batch_size": timing["timing"]["batch_size"],
        "device": timing["timing"]["device"],
    }


def graded_by(record: dict, grader: str, folder: Path) -> tuple[str, str]:
    """(prefix of its keys in results and verdicts, its name on a chart). Raises ConfigError where it graded nothing."""
    check_names([grader], list(GRADERS), "grader")
    benchmark = "strict_correct" in record.get("verdicts", {})
    if grader == "strict" and not benchmark:
        raise ConfigError(f"{folder} has no verdicts by the strict rules, only by an exact checker; set grader to "
                          "'published'")  # fmt: skip
    prefix, rules = GRADERS[grader]
    return prefix, rules if benchmark else EXACT


def measured_verdicts(
    grid: Grid, records: Path, seed: int, grader: str = "published", allow_incomplete: bool = False
) -> pd.DataFrame:
    """One row per sample of the grid's finished cells, in the columns of kvlib.stats; kv_budget inf = full cache.

    Raises IncompleteError naming what is missing unless allow_incomplete, RecordError for a record without verdicts.
    """
    finished, missing = _finished(grid, records, seed)
    if missing and not (allow_incomplete and finished):
        count = f"{len(missing)} of {len(missing) + len(finished)} cells missing in {records.absolute()}"
        again = f"make sweep PROFILE={grid.path.stem} SEED={seed}"
        raise IncompleteError(f"{count}: {', '.join(missing[:8])}. If it is the right folder, make them with `{again}`")
    frames = []
    for cell, record in finished:
        folder = records / cell.cell_path
        marks = _marks(record, graded_by(record, grader, folder)[0], folder)
        budget = math.inf if cell.kv_budget is None else float(cell.kv_budget)
        frames.append(marks.assign(dataset=dataset_title(cell.dataset), kv_budget=budget))
    return pd.concat(frames, ignore_index=True)


def what_n_tells(cells: pd.DataFrame) -> list[str]:
    """Per number of problems, in a sentence or three, which differences it can show. All computed from n.

    The interval is Wilson's at 50 %; the smallest difference between two budgets is the least that an exact test over
    problems can call real at 5 %; beside a published bar, two independent shares at 50 %, found with a chance of 80 %.
    """
    sentences = []
    for (n, n_samples), group in cells.groupby(["n_problems", "n_samples"], sort=False):
        low, high = (50 * float(np.diff(wilson_interval(k // 2, k))[0]) for k in (n * n_samples, n))
        found_low, found_high = (100 * (1.959964 + 0.841621) * math.sqrt(0.5 / k) for k in (n * n_samples, n))
        fewest = next(k for k in range(1, 99) if 2 * 0.5**k < 0.05)
        samples, alone, found = "1 sample", "", f"{found_high:.0f}"
        if n_samples > 1:
            samples = f"{n_samples} samples"
            alone = f" (±{low:.0f} if a problem's samples were independent)"
            found = f"{found_low:.0f} to {found_high:.0f}"
        sentences.append(
            f"{', '.join(group['dataset'].unique())}: n = {n} problems, {samples} each. The 95 % interval of a bar "
            f"near 50 % is about ±{high:.0f} points{alone}. Two budgets can be told apart only if at least {fewest} "
            f"problems change, and {fewest} suffice only if they all change the same way: {100 * fewest / n:.0f} "
            "points if each was wrong and is right. Beside a bar from elsewhere, such as a published one, a difference "
            f"of {found} points is found four times in five; less is mostly missed."
        )
    return sentences
