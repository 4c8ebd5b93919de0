"""One HTML page of a study that needs nothing else: charts with their numbers, tables, and where they come from."""

import base64
import csv
import html
from pathlib import Path

from kvlib.charts.rows import samples_text
from kvlib.config import Grid
from kvlib.record import RecordError, read_record

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
img { max-width: 100%; height: auto; display: block; background: #fff; }
figure { margin: 1rem 0; } figcaption, caption { color: #555; text-align: left; padding: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
td { overflow-wrap: anywhere; min-width: 4rem; }
thead th { border-bottom: 2px solid #888; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 13px; }
.warning { border-left: 6px solid #b84a00; background: #fdf1e7; padding: .6rem 1rem; }
"""
TITLES = {
    "measured": "Measured here",
    "answer": "How much KV cache is needed",
    "answer-needs": "Problems by the smallest KV budget that solves them",
    "budgets": "Measured here: KV budgets compared pairwise",
    "published": "Published, not measured here",
    "published-r1-llama": "Published for R1-Llama, not measured here",
}


def report_html(grid: Grid, seed: int, charts: list[Path], tables: list[Path], records: dict[str, Path]) -> str:
    """The page. charts: PNG files; tables: CSV files, the first row the header; records: folder of every cell and
    timing run that the grid asks for, by name. Cells without a valid record are named in a warning at the top.
    """
    found, lost = {}, {}
    for name, folder in records.items():
        try:
            found[name] = read_record(folder)
        except RecordError as error:
            lost[name] = str(error)
    parts = [f"<h1>Study {text(grid.study)}, seed {seed}</h1>", summary(grid, seed)]
    if lost:
        items = "".join(f"<li>{text(name)}: {text(why)}</li>" for name, why in lost.items())
        parts.append(
            f'<div class="warning"><strong>Incomplete: {len(lost)} of {len(records)} records are missing or '
            f"damaged.</strong><ul>{items}</ul></div>"
        )
    numbers, pictures = {path.stem: rows_of(path) for path in tables}, {path.stem: path for path in charts}
    place = {stem: i for i, stem in enumerate(TITLES)}
    for stem in sorted(pictures | numbers, key=lambda stem: place.get(stem, len(place))):
        title = TITLES.get(stem, stem.replace("-", " ").capitalize())
        parts.append(f"<h2>{text(title)}</h2>")
        if stem in pictures:
            parts.append(figure(pictures[stem], numbers.get(stem)))
        if stem in numbers:
            parts.append(table(numbers[stem], f"The numbers of the chart {stem}" if stem in pictures else title))
    parts += ["<h2>Provenance</h2>", provenance_table(found), "<h2>The study's file</h2>"]
    parts.append(f"<p>{text(grid.path.name)}</p><pre>{text(grid.path.read_text(encoding='utf-8'))}</pre>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(grid.study)}, seed {seed}: KV budget study</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def answer_text(figures: Path) -> str:
    """The answer that a study's charts hold, a sentence per dataset, for the terminal; empty where there is none."""
    path = figures / "answer.csv"
    return "\n".join(row[-1] for row in rows_of(path)[1:]) if path.exists() else ""


def summary(grid: Grid, seed: int) -> str:
    one = grid.cells(seed)[0]
    options = ", ".join(f"{name} {value}" for name, value in one.policy_options.items())
    return (
        f"<p>Model {text(one.model)} in {text(one.dtype)}; policy {text(grid.shared.get('policy', one.policy))} "
        f"{text(f'({options})' if options else '')}; prompt {one.prompt}, {samples_text([one.n_samples])}, "
        f"temperature {one.temperature}, top-p {one.top_p}, "
        f"top-k {one.top_k}, at most {one.max_new_tokens} new tokens. Pass@1 with a 95 % interval; throughput in "
        "tokens/s with attention, eviction, sampling and bookkeeping included, unless a table says otherwise.</p>"
    )


def figure(path: Path, rows: list[list[str]] | None) -> str:
    """The chart embedded. Its alternative text repeats the table's first columns, for who cannot see it."""
    content = base64.b64encode(path.read_bytes()).decode()
    alt = f"Chart: {TITLES.get(path.stem, path.stem)}" + ("" if rows else "; its numbers are in no table of this page")
    if rows:
        alt += f" ({', '.join(rows[0][:5])}): " + "; ".join(", ".join(row[:5]) for row in rows[1:])
    return f'<figure><img alt="{text(alt)}" src="data:image/png;base64,{content}"></figure>'


def table(rows: list[list[str]], caption: str) -> str:
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in rows[0])
    body = "".join(
        "<tr>" + f'<th scope="row">{text(row[0])}</th>' + "".join(f"<td>{text(c)}</td>" for c in row[1:]) + "</tr>"
        for row in rows[1:]
    )
    return (
        f'<div class="scroll"><table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def provenance_table(records: dict[str, dict]) -> str:
    """Per record: what it answers for, when, where and with what it was made."""
    rows = [["Record", "Made (UTC)", "Commit", "Versions", "Machine", "Model", "Fingerprint", "sha256"]]
    for name, record in records.items():
        provenance = record.get("provenance", {})
        made, started = provenance.get("finished", provenance), provenance.get("started", {})
        commit = (made.get("git_commit") or "outside git")[:12] + (" + edits" if made.get("git_dirty") else "")
        versions = ", ".join(f"{package} {version}" for package, version in made.get("versions", {}).items())
        machine = record.get("timing", {}).get("device") or made.get("cpu") or "?"
        rows.append(
            [
                name,
                made.get("utc", "?"),
                commit,
                versions,
                f"{machine}, {made.get('cores', '?')} cores, {made.get('os', '?')}",
                (started.get("model") or "")[:12],
                (record.get("fingerprint") or "")[:12],
                record["sha256"][:12],
            ]
        )
    return table(rows, "Hashes are cut to 12 digits; the records hold them whole")


def rows_of(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def text(value) -> str:
    return html.escape(str(value))
