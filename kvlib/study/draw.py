"""A study's charts, report and published results, made from its records."""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import kvlib
from kvlib.charts.report import answer_text, report_html
from kvlib.config import Cell
from kvlib.errors import ConfigError
from kvlib.files import write_atomically
from kvlib.record import canonical, explained, load_samples, read_record, sha256
from kvlib.study.cell_command import execute_notebook
from kvlib.study.layout import SNAKEFILE, Study, cell_fingerprints, known_fingerprints, timing_fingerprints, unfinished
from kvlib.study.processes import NotebookError, StudyError

DRAWN = (".png", ".svg", ".csv")
DRAWN_BY = ("charts/*.py", "stats.py", "tasks/*.py", "config.py", "record.py")
"""The code that charts and their numbers depend on, in kvlib."""


def draw(study: Study) -> None:
    """Execute the charts notebook, unless the charts at hand were drawn from the same records and code."""
    check_charts(study)
    now = charts_fingerprint(study)
    if is_drawn(study, now):
        print("the charts are up to date", flush=True)
        return
    with explained(study.figures):
        study.figures.mkdir(parents=True, exist_ok=True)
        for path in drawn(study):
            path.unlink()
    draw_into(study, study.figures)
    if not drawn(study):
        raise StudyError(f"{study.charts} ran to its end and drew nothing into {study.figures}")
    with explained(study.figures):
        write_atomically(study.figures / "drawn_from", now.encode())


def check_charts(study: Study) -> None:
    if study.grid.comparison:
        raise ConfigError(
            f"{study.grid.path.name} is a comparison: publish it with `python -m kvlib.compare publish` and open the "
            "comparison's notebook, which draws it"
        )


def draw_into(study: Study, figures: Path, **options) -> None:
    parameters = {"grid": str(study.grid.path), "records": str(study.folder), "seed": study.seed}
    parameters["published"] = str(SNAKEFILE.parent / "results" / "published")  # wherever the grid lies
    execute_notebook(study.charts, figures / "charts.ipynb", {**parameters, "figures": str(figures), **options}, {})


def charts_fingerprint(study: Study) -> str:
    records = [read_record(folder)["sha256"] for folder in [*study.cells, *study.timings]]
    home = Path(kvlib.__file__).parent
    code = sorted(path for pattern in DRAWN_BY for path in home.glob(pattern))
    texts = [study.grid.path.read_text(), code_of(study.charts), *(path.read_text() for path in code)]
    return sha256("\n".join([*records, *texts]).encode())


def code_of(notebook: Path) -> str:
    """A notebook's code cells; its prose and outputs draw nothing. Raises ConfigError."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{notebook} is not a notebook; restore it with `git checkout -- {notebook}`") from error


def is_drawn(study: Study, fingerprint: str) -> bool:
    stamp = study.figures / "drawn_from"
    return stamp.exists() and stamp.read_text() == fingerprint and drawn(study) != []


def drawn(study: Study) -> list[Path]:
    return sorted(path for path in study.figures.glob("*") if path.suffix in DRAWN)


def make_report(study: Study) -> Path:
    """Write report.html beside the charts; of an unfinished study it says on top what is missing."""
    check_charts(study)
    prints = known_fingerprints(study)
    records = [*study.cells, *study.timings]
    whole = prints is not None and not unfinished(prints | timing_fingerprints(study))
    with tempfile.TemporaryDirectory() as drafts:
        figures = study.figures if whole else Path(drafts)
        if whole:
            draw(study)
        elif any((folder / "record.json").exists() for folder in records):
            with contextlib.suppress(NotebookError):  # nothing to draw yet
                draw_into(study, figures, allow_incomplete=True)
        images, tables = (sorted(figures.glob(pattern)) for pattern in ("*.png", "*.csv"))
        page = report_html(study.grid, study.seed, images, tables, {study.name(folder): folder for folder in records})
    with explained(study.figures):
        write_atomically(study.figures / "report.html", page.encode())
    if whole:
        print(answer_text(study.figures))
    return study.figures / "report.html"


def publish(study: Study, results: Path) -> None:
    """Copy what a whole study found, and no output text: records and charts, or a comparison's cells in one file."""
    prints = cell_fingerprints(study) | timing_fingerprints(study)
    left = unfinished(prints)
    do = "run" if study.grid.comparison else "charts"
    if left or not (study.grid.comparison or is_drawn(study, charts_fingerprint(study))):
        what = f"{len(left)} cells are not done, the first is {study.name(left[0])}" if left else "charts are outdated"
        raise StudyError(f"{study.folder}: {what}; first run:\n{study.command(do)}")
    with explained(results):
        if study.grid.comparison:
            publish_comparison(study, results)
            return
        shutil.rmtree(results / "records", ignore_errors=True)
        for folder in prints:
            target = results / "records" / study.name(folder)
            target.mkdir(parents=True)
            shutil.copyfile(folder / "record.json", target / "record.json")
        for path in drawn(study):
            shutil.copyfile(path, results / path.name)
    print(f"{len(prints)} records and {len(drawn(study))} chart files copied to {results}")


def publish_comparison(study: Study, results: Path) -> None:
    """Write cells.jsonl, a published_cell a line; and sources.json: where they come from."""
    lines, sources = [], {}
    for cell in study.grid.comparison.cells:
        line = published_cell(cell, study.folder / cell.path)
        source = {k: v for k, v in line.pop("provenance")["finished"].items() if k not in ("utc", "command")}
        line["source"] = sources.setdefault(canonical(source).decode(), len(sources))
        lines.append(canonical(line) + b"\n")
    write_atomically(results / "cells.jsonl", b"".join(lines))
    table = {number: json.loads(text) for text, number in sources.items()}
    write_atomically(results / "sources.json", (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
    print(f"{len(lines)} cells written to {results / 'cells.jsonl'}")


def published_cell(cell: Cell, folder: Path) -> dict:
    """Of a comparison's finished cell: what its record says, and of every sample the verdict, length and stop."""
    record = read_record(folder)
    samples = load_samples(folder / "samples.jsonl")[1]
    ordered = [samples[name] for name in sorted(samples, key=lambda name: [int(n) for n in name.split("/")[1:]])]
    return {
        "model": cell.config.model,
        "dataset": cell.config.dataset,
        "arm": cell.arm,
        "protected": cell.protected,
        **{name: record[name] for name in ("config", "results", "cost", "provenance")},
        "record_sha256": record["sha256"],
        "problems": [sample["problem"].split("/")[1] for sample in ordered],
        "correct": [int(sample["correct"]) for sample in ordered],
        "n_tokens": [sample["n_tokens"] for sample in ordered],
        "truncated": [int(sample["stop"] == "length") for sample in ordered],
    }
