"""From a folder of records to the tables that charts draw, and what they can tell. Never imports torch."""

import math
from pathlib import Path

import pandas as pd

from kvlib.charts.measured import EXACT, PUBLISHED_RULES, TINY_CAVEAT, IncompleteError
from kvlib.config import Grid, folder_name
from kvlib.errors import ConfigError
from kvlib.record import RecordError, read_record
from kvlib.tasks.datasets import dataset_title
from kvlib.stats import wilson_interval

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


MODEL_TITLES = {
    "tiny": "Tiny-0.8M",
    "smollm2": "SmolLM2-135M",
    "DeepSeek-R1-Distill-Qwen-7B": "R1-Qwen",
    "DeepSeek-R1-Distill-Llama-8B": "R1-Llama",
}
THROUGHPUTS = {"forward": "forward time only, as published", "goodput": "useful tokens over total time"}
GRADERS = {"published": "", "strict": "strict_"}


def model_title(name: str) -> str:
    """The name on a chart: a short one for the models of the profiles, else the last part of the hub id or path."""
    last = name.rstrip("/").split("/")[-1].split("@")[0]
    return MODEL_TITLES.get(last, last)


def expected_cells(grid: Grid, seed: int) -> list[tuple[str, int | None]]:
    """(dataset title, KV budget or None) of every cell, in the order of the panels."""
    return [(dataset_title(cell.dataset), cell.kv_budget) for cell in grid.cells(seed)]


def measured_cells(
    grid: Grid, records: Path, seed: int, grader: str = "published", throughput: str = "steps"
) -> pd.DataFrame:
    """One row per finished cell of the grid, with its throughput, in the columns that figures.measured_figure asks for.

    grader: whose verdicts, "published" or "strict"; embedded chains have one exact checker. throughput: "steps",
    "forward" or "goodput" (kvlib.study.timing.measure).

    Cells without a record, or of a dataset without a timing record, are left out: measured_figure refuses or marks
    them. Raises RecordError for a damaged record, or one made with other settings than the grid's; ConfigError for a
    grid without timing, or verdicts or a throughput that the records do not hold.
    """
    _check_choice("grader", grader, GRADERS)
    _check_choice("throughput", throughput, ["steps", *THROUGHPUTS])
    if grid.timing is None:
        raise ConfigError("the grid asks for no timing, and the charts draw throughput; add a timing: line to it")
    policy = grid.shared.get("policy", "dynts")
    rows = []
    for cell in grid.cells(seed):
        folder = records / cell.cell_path
        timing_folder = records / folder_name(cell.dataset) / "timing" / f"s{seed}"
        if not (folder / "record.json").exists() or not (timing_folder / "record.json").exists():
            continue
        record, timing = read_record(folder), read_record(timing_folder)
        measured = {(row["kv_budget"], row["definition"]): row for row in timing["results"]["throughput"]}
        if record["config"] != cell.parameters() or (cell.kv_budget, throughput) not in measured:
            raise RecordError(f"{folder} was made with other settings than {grid.path} asks for; run the grid again")
        if any(timing["timing"][name] != value for name, value in grid.timing.items()):
            raise RecordError(
                f"{timing_folder} was timed with other settings than {grid.path} asks for; run the grid again"
            )
        results, speed = record["results"], measured[cell.kv_budget, throughput]
        own = graded_by(record, grader, folder)
        both = {}
        if "strict_pass_at_1" in results:
            both["strict_pass_at_1"] = 100 * results["strict_pass_at_1"]
            both["unanswered_share"] = results[f"{own[0]}n_unanswered"] / results["n_samples"]
        definition = THROUGHPUTS.get(throughput, timing["timing"]["definition"])
        rows.append(
            {
                "model": model_title(cell.model),
                "dataset": dataset_title(cell.dataset),
                "policy": POLICY_TITLES.get(policy, policy),
                "kv_budget": cell.kv_budget,
                "grader": own[1],
                "pass_at_1": 100 * results[f"{own[0]}pass_at_1"],
                "pass_low": 100 * results[f"{own[0]}pass_low"],
                "pass_high": 100 * results[f"{own[0]}pass_high"],
                "n_problems": results["n_problems"],
                "n_samples": record["config"]["n_samples"],
                "throughput": speed["median"],
                "throughput_low": speed["low"],
                "throughput_high": speed["high"],
                "throughput_definition": f"Throughput (tokens/s, {definition})",
                "batch_size": timing["timing"]["batch_size"],
                "device": timing["timing"]["device"],
                "mean_tokens": results["n_tokens"] / results["n_samples"],
                "truncated_share": results["n_truncated"] / results["n_samples"],
                "mean_live_slots": results["mean_live_slots"],
                "peak_slots": results["peak_slots"],
                "batch_halved": record["cost"].get("batch_halved", False),
                **both,
            }
        )
    return pd.DataFrame(rows)


def graded_by(record: dict, grader: str, folder: Path) -> tuple[str, str]:
    """(prefix of its keys in results and verdicts, its name on a chart). Raises ConfigError where it graded nothing."""
    benchmark = "strict_pass_at_1" in record["results"]
    if grader == "strict" and not benchmark:
        raise ConfigError(f"{folder} has no verdicts by the strict rules, only by an exact checker; set grader to "
                          "'published'")  # fmt: skip
    names = {"published": PUBLISHED_RULES, "strict": "strict rules"}
    return GRADERS[grader], names[grader] if benchmark else EXACT


def measured_verdicts(
    grid: Grid, records: Path, seed: int, grader: str = "published", allow_incomplete: bool = False
) -> pd.DataFrame:
    """One row per sample of the grid's finished cells, in the columns of kvlib.stats; kv_budget inf = full cache.

    Raises IncompleteError naming what is missing unless allow_incomplete, RecordError for a record without verdicts.
    """
    _check_choice("grader", grader, GRADERS)
    frames, missing = [], []
    for cell in grid.cells(seed):
        folder = records / cell.cell_path
        if not (folder / "record.json").exists():
            missing.append(cell.cell_path)
            continue
        record = read_record(folder)
        prefix, _ = graded_by(record, grader, folder)
        verdicts = record.get("verdicts", {}).get(f"{prefix}correct")
        if verdicts is None:
            raise RecordError(f"{folder}/record.json holds no verdicts per problem: an older kvlib wrote it. Move it "
                              "away and run the study again: it is rebuilt from its samples")  # fmt: skip
        rows = [(name, i, mark == "1") for name, marks in verdicts.items() for i, mark in enumerate(marks)]
        budget = math.inf if cell.kv_budget is None else cell.kv_budget
        frame = pd.DataFrame(rows, columns=["problem", "sample", "correct"])
        frames.append(frame.assign(dataset=dataset_title(cell.dataset), kv_budget=float(budget)))
    if missing and not (allow_incomplete and frames):
        raise IncompleteError(f"{len(missing)} cells missing: {', '.join(missing[:8])}; run the study again")
    return pd.concat(frames, ignore_index=True)


def published_beside(cells: pd.DataFrame, references: list[pd.DataFrame]) -> pd.DataFrame | None:
    """The published values that may stand beside these cells: of the same model, graded by the published rules."""
    for reference in references if len(cells) else []:
        same = cells["model"].eq(reference["model"].iloc[0]).all() and cells["grader"].eq(PUBLISHED_RULES).all()
        rows = reference[reference["dataset"].isin(cells["dataset"]) & reference["kv_budget"].isin(cells["kv_budget"])]
        if same and len(rows):
            return rows
    return None


def what_n_tells(cells: pd.DataFrame) -> list[str]:
    """Per number of problems, in a sentence or three, which differences it can show. All computed from n.

    The interval is Wilson's at 50 %; the smallest difference between two budgets is the least that an exact test over
    problems can call real at 5 %; beside a published bar, two independent shares at 50 %, found with a chance of 80 %.
    """
    sentences = []
    for (n, n_samples), group in cells.groupby(["n_problems", "n_samples"], sort=False):
        low, high = (100 * half_width(k) for k in (n * n_samples, n))
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


def half_width(n: int) -> float:
    low, high = wilson_interval(n // 2, n)
    return (high - low) / 2


def _check_choice(name: str, value: str, known) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; use one of {', '.join(known)}")


def caveat_of(grid: Grid) -> str:
    """The sentence under the study's charts: what its model cannot stand for."""
    return TINY_CAVEAT if grid.cells()[0].model == "tiny" else ""
