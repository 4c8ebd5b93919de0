"""What every notebook looks like, for who reads on GitHub: `python -m kvlib.charts.gallery` writes docs/gallery.

A page per notebook, executed in its own folder with the settings of SETTINGS; a notebook whose page was made from what
is here now is not executed again. Never imports torch itself.
"""

import hashlib
import io
import json
import re
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "55_replay": {"n_traces": 2, "n_drills": 2, "kv_budgets": [96, 136]},
    "80_train_reasoner": {"n_steps": 20},
    "90_train_predictor": {"n_traces": 120, "n_held_out": 20},
    "30_run": {"n_problems": 20, "batch_size": 20},
    "60_your_policy": {"n_problems": 40},
}
"""What keeps a notebook to minutes; the page says so."""
BAR = "application/vnd.jupyter.widget-view+json"
"""Of an output that is a progress bar, which shows how fast this machine was."""
WIDEST, MOST_ROWS = 1100, 14  # pixels of a picture, rows of a table


def made_from(notebook: Path) -> str:
    """Hash of what decides a page: the notebook, its settings and the code of kvlib.charts."""
    files = [notebook, *sorted((ROOT / "kvlib" / "charts").glob("*.py"))]
    parts = [json.dumps(SETTINGS.get(notebook.stem, {})), *(path.read_text(encoding="utf-8") for path in files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def outdated(notebooks: Path, pages: Path) -> list[Path]:
    """The notebooks whose page is missing or was made from something else."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in pages.glob("*.md")}
    stamps = {stem: text.rpartition("made from ")[2][:64] for stem, text in texts.items()}
    return [path for path in sorted(notebooks.glob("*.ipynb")) if stamps.get(path.stem) != made_from(path)]


def page(notebook: Path, pages: Path) -> None:
    """Execute the notebook and write its page and pictures. Raises papermill's error if a cell fails."""
    import papermill
    from nbconvert import MarkdownExporter

    settings = SETTINGS.get(notebook.stem, {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = {"folder": scratch} if "folder" in papermill.inspect_notebook(str(notebook)) else {}
        done = papermill.execute_notebook(
            notebook, None, {**settings, **folder}, cwd=notebook.parent, kernel_name="python3", progress_bar=False
        )
    for cell in done.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                out for out in cell.outputs if out.get("name") != "stderr" and BAR not in out.get("data", {})
            ]
            for data in (out["data"] for out in cell.outputs if "text/html" in out.get("data", {})):
                data["text/html"] = shortened(data["text/html"])
    done.cells = [cell for cell in done.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    named = {"unique_key": notebook.stem, "output_files_dir": f"{notebook.stem}_files"}
    body, resources = MarkdownExporter().from_notebook_node(done, named)
    said = f"; with {', '.join(f'{name} = {value}' for name, value in settings.items())}" if settings else ""
    head = f"[All notebooks](README.md) · executed from [{notebook.name}](../../notebooks/{notebook.name}){said}\n\n"
    # Pictures of an earlier run may have other names.
    shutil.rmtree(pages / named["output_files_dir"], ignore_errors=True)
    (pages / named["output_files_dir"]).mkdir(parents=True)
    for name, data in resources["outputs"].items():
        (pages / name).write_bytes(smaller(data) if name.endswith(".png") else data)
    body = body.replace(f"{ROOT}/", "")  # where this clone lies is nobody's business
    text = f"{head}{body.rstrip()}\n\n<!-- made from {made_from(notebook)} -->\n"
    (pages / f"{notebook.stem}.md").write_text(text, encoding="utf-8")


def shortened(html: str) -> str:
    """A long table's first rows."""
    rows = re.findall(r"<tr>.*?</tr>", html, re.DOTALL)
    if len(rows) <= MOST_ROWS + 1:
        return html
    start, end = html.index(rows[MOST_ROWS]), html.rindex("</tr>") + len("</tr>")
    return f"{html[:start]}<tr><td>… and {len(rows) - MOST_ROWS} more rows</td></tr>{html[end:]}"


def smaller(png: bytes) -> bytes:
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((WIDEST, 10 * WIDEST))
    small = io.BytesIO()
    picture.quantize(96).save(small, "PNG", optimize=True)
    return small.getvalue()


def contents(pages: Path) -> str:
    """The page that lists the others, each with its first picture."""
    lines = ["# What the notebooks look like", ""]
    for path in sorted(pages.glob("[0-9]*.md")):
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# (.*)", text, re.MULTILINE)
        picture = re.search(r"!\[png\]\(([^)]+)\)", text)
        lines += [f"## [{title[1] if title else path.stem}]({path.name})", ""]
        lines += [f"[![{path.stem}]({picture[1]})]({path.name})", ""] if picture else []
    return "\n".join(lines)


def main() -> None:
    notebooks, pages = ROOT / "notebooks", ROOT / "docs" / "gallery"
    pages.mkdir(parents=True, exist_ok=True)
    for notebook in outdated(notebooks, pages):
        print(f"executing {notebook.name}", flush=True)
        page(notebook, pages)
    (pages / "README.md").write_text(contents(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
