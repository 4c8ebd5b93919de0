"""Whether a folder of records is whole: every checksum, every sample once, every cell that the grid asks for."""

from dataclasses import dataclass, field
from pathlib import Path

from kvlib.config import RunConfig
from kvlib.errors import ConfigError
from kvlib.record import RecordError, load_samples, read_record


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
        config = RunConfig.from_parameters(record["config"])
    except ConfigError as error:
        raise RecordError(f"{where} states a config that cannot be: {error}") from error
    if config.cell_path != name:
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


def verdict_text(root: Path, verdict: Verdict) -> str:
    lines = [f"{root}: {verdict.n_records} records and {verdict.n_samples:,} samples are whole"]
    lines += [f"bad      {sentence}" for sentence in verdict.bad]
    lines += [f"missing  {name}" for name in verdict.missing]
    if not verdict.whole:
        lines.append(f"{len(verdict.bad)} bad, {len(verdict.missing)} missing")
    return "\n".join(lines)
