"""The report is one page that needs no network, says its numbers in words too, and hides nothing that is missing."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

from kvlib.charts.report import TITLES, report_html
from kvlib.config import load_grid

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "tiny"


def page(lost=()):
    grid = load_grid(ROOT / "notebooks" / "tiny.yml")
    records = {cell.cell_path: RESULTS / "records" / cell.cell_path for cell in grid.cells()}
    records |= {f"{name}/timing/s0": RESULTS / "records" / name / "timing" / "s0" for name in grid.datasets}
    records |= dict.fromkeys(lost, RESULTS / "nowhere")
    return report_html(grid, 0, sorted(RESULTS.glob("*.png")), sorted(RESULTS.glob("*.csv")), records)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_in_itself_and_readable_without_pictures():
    text = page()
    tags = Tags(text)
    assert not tags.open and not re.search(r"(href|src)=\"(?!data:)", text) and "<script" not in text
    pictures = [attributes for tag, attributes in tags.found if tag == "img"]
    assert len(pictures) == len(list(RESULTS.glob("*.png"))) and all(
        picture["src"].startswith("data:image/png;base64,") for picture in pictures
    )
    with (RESULTS / "measured.csv").open() as file:
        assert ", ".join(list(csv.reader(file))[1][:5]) in pictures[0]["alt"]
    assert all(picture["alt"] for picture in pictures)
    assert "<td>40.5 (33.9 to 47.4)</td>" in text and "Incomplete" not in text
    assert "datasets: [chain-a, chain-b, chain-c, chain-d]" in text  # the study's own file
    assert "chain-d/full/bfull/s0" in text and "torch 2." in text and "Published, not measured here" in text
    headings = re.findall("<h2>(.*?)</h2>", text)[: len(TITLES)]
    assert headings == list(TITLES.values()), "what was measured stands first"
    assert "Chain-A: KV budget 196 is the smallest of 6" in text, "the answer, in words"
    assert "nowrap" not in text, "a wide table wraps and is not cut"


def test_what_is_missing_stands_on_top():
    text = page(lost=["chain-a/dynts/b<7>/s0"])
    assert "Incomplete: 1 of 33 records are missing or damaged" in text
    assert text.index("Incomplete") < text.index("<img") and "b&lt;7&gt;" in text and "b<7>" not in text
