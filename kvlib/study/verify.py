"""Whether a folder of records is whole: every checksum, every sample once, every cell that the grid asks for."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvlib.config import Cell, Grid, RunConfig, load_grid
from kvlib.errors import ConfigError
from kvlib.record import RecordError, load_samples, read_record
from kvlib.study.plan import Plan


@dataclass
class Verdict:
    """What was found. bad: a sentence per damaged, edited or misplaced file. missing: cells without a record."""

    n_records: int = 0
    n_samples: int = 0
    bad: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.bad and not self.missing


def verify_folder(root: Path, grid: Grid | None, seeds: Iterable[int]) -> Verdict:
    """Of a folder of records, of a published comparison or of a bench. grid, seeds: what must be there, if known."""
    if benches := benches_in(root):
        return verify_benches(benches)
    if grid is None:
        return verify(root, {}, [], {})
    cells = {name: config for seed in seeds for name, config in grid.folders(seed).items()}
    if grid.comparison and (root / "cells.jsonl").exists():
        return verify_published(root / "cells.jsonl", cells)
    return verify(root, cells, [name for seed in seeds for name in grid.timings(seed)], Plan(grid, 0).problems)


def benches_in(root: Path) -> list[Path]:
    """The records of a bench, if the folder holds no others."""
    others = (root / "cells.jsonl").exists() or any(root.rglob("record.json"))
    return [] if others else sorted(root.glob("*.json"))


def verify(root: Path, cells: dict[str, RunConfig], timings: list[str], problems: dict[str, int]) -> Verdict:
    """Read every record and samples file below root. cells, timings: what must be there, by folder below root.

    problems: how many a dataset has, where that is known.
    Cells of other settings or seeds are read too: they must be whole, and each in the folder of its own config.
    """
    verdict = Verdict(missing=[name for name in [*cells, *timings] if not (root / name / "record.json").exists()])
    for folder in sorted({path.parent for name in ("record.json", "samples.jsonl") for path in root.rglob(name)}):
        try:
            check_folder(folder, str(folder.relative_to(root)), cells, problems, verdict)
        except RecordError as error:
            verdict.bad.append(str(error))
    return verdict


def check_folder(
    folder: Path, name: str, cells: dict[str, RunConfig], problems: dict[str, int], verdict: Verdict
) -> None:
    """Count a folder's record and samples. Raises RecordError naming the file that is not what it must be."""
    path = folder / "samples.jsonl"
    samples = load_samples(path)[1] if path.exists() else None
    verdict.n_samples += len(samples or ())
    if not (folder / "record.json").exists():
        return
    record = read_record(folder)
    verdict.n_records += 1
    where = folder / "record.json"
    if record.get("kind", "cell") != "cell":
        return
    if name in cells and record["config"] != cells[name].parameters():
        raise RecordError(f"{where} was made with other settings than the grid asks for; run the study again")
    try:
        config = RunConfig(**record["config"])
    except ConfigError as error:
        raise RecordError(f"{where} states a config that cannot be: {error}") from error
    if name not in cells and config.cell_path != name:
        raise RecordError(
            f"{where} is the record of {config.cell_path}, so it counts a cell twice or hides one; move it back"
        )
    n_stated = record["results"].get("n_samples")
    if samples is not None and n_stated not in (None, len(samples)):
        raise RecordError(f"{where} states {n_stated} samples and {path} holds {len(samples)}; run the study again")
    n_problems = config.n_problems or problems.get(config.dataset)
    wanted = n_problems and n_problems * config.n_samples
    if wanted and n_stated not in (None, wanted):
        raise RecordError(f"{where} states {n_stated} samples and its config asks for {wanted}; run the study again")
    for marks in record.get("verdicts", {}).values():
        short = [problem for problem, own in marks.items() if len(own) != config.n_samples]
        if short or (n_problems and len(marks) != n_problems):
            raise RecordError(
                f"{where} holds verdicts on {len(marks)} problems, {len(short)} of them on other than "
                f"{config.n_samples} samples, and must hold one on each sample of {n_problems or 'all'} problems; "
                "run the study again"
            )


def owner(root: Path, grids: Path) -> tuple[Grid | None, set[int], str]:
    """Whose records lie below root: of the grid files in a folder the one that asks for the most, seeds, in words."""
    if benches_in(root):
        return None, set(), "of a bench"
    found: dict[str, dict] = {}
    for path in root.rglob("record.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_bytes())
            if record.get("kind", "cell") == "cell":
                found[str(path.parent.relative_to(root))] = record["config"]
    for line in published_lines(root / "cells.jsonl"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            cell = json.loads(line)
            found[published_path(cell)] = cell["config"]
    seeds = {config["seed"] for config in found.values() if type(config.get("seed")) is int}
    best, most = None, 0
    for path in sorted(grids.glob("*.yml")):
        with contextlib.suppress(ConfigError):
            grid = load_grid(path)
            asked = {name: config for seed in seeds for name, config in grid.folders(seed).items()}
            n = sum(name in asked and asked[name].parameters() == config for name, config in found.items())
            best, most = (grid, n) if n > most else (best, most)
    if best:
        return best, seeds, f"of study {best.study} ({best.path.name})"
    policy, model, data = (
        ", ".join(sorted({str(config.get(key)) for config in found.values()})) for key in ("policy", "model", "dataset")
    )
    return None, seeds, f"of {policy} with {model} on {data}, which no grid in {grids} asks for"


def published_lines(path: Path) -> list[str]:
    """A cell of a comparison each, as kvlib.study.draw.published_cell has it."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def published_path(cell: dict) -> str:
    return Cell(RunConfig(**cell["config"]), cell["arm"], cell["protected"]).path


def verify_published(path: Path, cells: Mapping[str, RunConfig]) -> Verdict:
    """Of a published comparison: every cell once, of the grid's config, its counts those of its verdicts."""
    verdict, seen = Verdict(), set()
    for number, line in enumerate(published_lines(path), 1):
        try:
            cell = json.loads(line)
            name, results, n = published_path(cell), cell["results"], len(cell["correct"])
            lists = [cell[key] for key in ("problems", "correct", "n_tokens", "truncated")]
            counts = [n, *map(sum, lists[1:])]
            stated = [results[key] for key in ("n_samples", "n_correct", "n_tokens", "n_truncated")]
            wrong = {
                "repeats": name in seen,
                "was made with other settings than the grid asks for,": name in cells
                and cell["config"] != cells[name].parameters(),
                "states counts that its verdicts do not add up to,": counts != stated
                or {len(own) for own in lists} != {n}
                or len(set(cell["problems"])) * cell["config"]["n_samples"] != n
                or abs(results["pass_at_1"] - counts[1] / n) > 1e-9,
            }
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            verdict.bad.append(f"{path}:{number} is damaged; restore the file with `git checkout -- {path}`")
            continue
        seen.add(name)
        verdict.bad += [f"{path}:{number} {what} {name}; publish the comparison again" for what in wrong if wrong[what]]
        verdict.n_records, verdict.n_samples = verdict.n_records + 1, verdict.n_samples + n
    verdict.missing = [name for name in cells if name not in seen]
    return verdict


def verify_benches(paths: list[Path]) -> Verdict:
    """Of the records of a bench: whole, complete, behind a gate that holds, a time for every round of every arm."""
    verdict = Verdict()
    for path in paths:
        try:
            record = json.loads(path.read_text())
            short = {arm["arm"]: len(arm["seconds"]) for arm in record["arms"]}
            if not (record["complete"] and record["gate"]["holds"] and set(short.values()) == {record["rounds"]}):
                raise ValueError(f"complete: {record['complete']}, gate: {record['gate']['holds']}, rounds: {short}")
            verdict.n_records += 1
            verdict.n_samples += sum(short.values())
        except (OSError, ValueError, KeyError, TypeError) as error:
            verdict.bad.append(f"{path} is no whole record of a bench ({error}); measure again")
    return verdict


def verdict_text(root: Path, verdict: Verdict, whose: str = "") -> str:
    lines = [f"{root}: {verdict.n_records} records and {verdict.n_samples:,} samples are whole{whose and f', {whose}'}"]
    lines += [f"bad      {sentence}" for sentence in verdict.bad]
    lines += [f"missing  {name}" for name in verdict.missing]
    if not verdict.whole:
        lines.append(f"{len(verdict.bad)} bad, {len(verdict.missing)} missing")
    return "\n".join(lines)
