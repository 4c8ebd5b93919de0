"""How far a study is, read from its files alone: while it runs, between runs, and before any."""

import contextlib
import errno
import fcntl
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvlib.config import RunConfig
from kvlib.cost import clock
from kvlib.record import RecordError, is_done, read_record
from kvlib.study.cell_command import read_failure
from kvlib.study.layout import Study


@dataclass(frozen=True)
class CellState:
    """A cell or timing run. done and total: samples (total None if not known); note: why it failed, or what is odd.

    seconds and new: the time that the finished cell took, and the samples that it decoded in that time.
    """

    name: str
    state: Literal["done", "running", "failed", "missing"]
    done: int = 0
    total: int | None = None
    note: str = ""
    seconds: float = 0.0
    new: int = 0


def cell_states(study: Study, prints: Mapping[Path, Collection[str]] | None) -> list[CellState]:
    """prints: the cells' fingerprints, None where they cannot be known here."""
    since = study.lock.stat().st_mtime if is_locked(study.lock) else None
    return [
        cell_state(study.folder, folder, config, prints and prints[folder], study.plan.n_samples(config), since)
        for folder, config in study.cells.items()
    ]


def cell_state(
    root: Path,
    folder: Path,
    config: RunConfig,
    marks: Collection[str] | None,
    total: int | None,
    since: float | None = None,
) -> CellState:
    """marks: the cell's fingerprints; None where they cannot be known here, then the config alone decides.

    since: when the run at work began (a file's time), None if there is none.
    """
    name = str(folder.relative_to(root))

    def belongs(entry: dict) -> bool:
        return entry["fingerprint"] in marks if marks else entry.get("config") == config.parameters()

    note = ""
    if (folder / "record.json").exists():
        try:
            record = read_record(folder)
        except RecordError as error:
            note = str(error)
        else:
            if belongs(record):
                n, cost = record["results"].get("n_samples", total or 0), record.get("cost", {})
                return CellState(name, "done", n, n, "", cost.get("seconds", 0.0), n - cost.get("resumed_samples", 0))
            note = "its record was made with other settings, data or weights; the next run decodes it anew"
    done = n_samples(folder / "samples.jsonl", belongs)
    log = folder / "run.log"
    why = why_failed(folder)
    # A cell loads its model's library before it takes its lock.
    begun = since is not None and not why and log.exists() and log.stat().st_mtime >= since
    if begun or is_locked(folder / ".lock"):
        return CellState(name, "running", done, total)
    return CellState(name, "failed" if why else "missing", done, total, why or note)


def n_samples(path: Path, belongs) -> int:
    """Whole lines of a samples file after its header, 0 if the header is another's."""
    with contextlib.suppress(OSError, ValueError, KeyError), path.open("rb") as file:
        if belongs(json.loads(file.readline())):
            return file.read().count(b"\n")
    return 0


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock (kvlib.record.locked): asked by a shared one, which writes nothing."""
    try:
        file = path.open("rb")
    except OSError:  # not there, or someone else's
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def why_failed(folder: Path) -> str:
    """The reason that the last attempt left in a cell's folder; "" if it left none."""
    return read_failure(folder).get("reason") or failure(folder / "run.log")


def failure(log: Path) -> str:
    """The cell command's last complaint; "" if the log has none."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = [i for i, line in enumerate(lines) if line.startswith("kvlib.")]
        if said:
            return " ".join(lines[said[-1] :]).split(": ", 1)[1]
        if any(line.startswith("Traceback") for line in lines):
            return lines[-1]
    return ""


def timing_state(root: Path, folder: Path, marks: Collection[str]) -> CellState:
    name = str(folder.relative_to(root))
    if is_done(folder, marks):
        return CellState(name, "done")
    why = failure(folder / "run.log")
    return CellState(name, "failed" if why else "missing", note=why)


def time_left(cells: list[CellState], planned_seconds: float, n_workers: int) -> str:
    """The time until all cells are done, and what it is reckoned from; "" if that is nothing.

    planned_seconds: of all cells, one after another, by the study's plan (NaN: not known), until a cell has finished.
    """
    if not all(cell.total for cell in cells):
        return ""
    left = sum(cell.total - cell.done for cell in cells if cell.state != "done")
    spent, new, whence = sum(cell.seconds for cell in cells), sum(cell.new for cell in cells), "finished cells"
    if not new:
        spent, new, whence = planned_seconds, sum(cell.total for cell in cells), "plan"
    seconds = left * spent / new / n_workers
    return f"about {clock(seconds)} of decoding, reckoned from the {whence}" if seconds > 0 else ""


def status_text(
    title: str, cells: list[CellState], timings: list[CellState], engine: bool, left: str, hint: str
) -> str:
    """What a person reads: counts, samples, time left, and a line for every cell that runs, failed or is odd."""
    counts = {state: sum(cell.state == state for cell in cells) for state in ("done", "running", "failed", "missing")}
    done, totals = sum(cell.done for cell in cells), [cell.total for cell in cells]
    of = f" of {sum(totals):,}" if None not in totals else ""
    lines = [
        f"{title}: {'a run is at work' if engine else 'no run is at work'}",
        f"cells    {', '.join(f'{n} {state}' for state, n in counts.items())} (of {len(cells)})",
        f"samples  {done:,}{of}",
    ]
    if timings:
        failed = sum(timing.state == "failed" for timing in timings)
        lines.append(
            f"timing   {sum(timing.state == 'done' for timing in timings)} of {len(timings)} done"
            + (f", {failed} failed" if failed else "")
        )
    if left:
        lines.append(f"left     {left}")
    for cell in [*cells, *timings]:
        samples = f", {cell.done:,} of {cell.total:,} samples" if cell.total and cell.state != "done" else ""
        if cell.state in ("running", "failed") or cell.note:
            lines.append(f"  {cell.state:<8} {cell.name}{samples}{': ' if cell.note else ''}{cell.note}")
    return "\n".join([*lines, hint] if hint else lines)
