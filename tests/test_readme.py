"""What the README shows is what was measured."""

import csv
import re
from pathlib import Path

import pytest

from kvlib.config import load_grid
from kvlib.figures import measured_table
from kvlib.panels import expected_cells, measured_cells

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_in_the_readme_is_the_committed_records():
    grid = load_grid(ROOT / "notebooks" / "grid.yml")
    cells = measured_cells(grid, ROOT / "results" / "tiny" / "records", seed=0)
    assert len(cells) == len(expected_cells(grid, 0)) == 28
    table = measured_table(cells)
    with (ROOT / "results" / "tiny" / "measured.csv").open() as file:
        assert list(csv.reader(file)) == [list(table.columns), *table.values.tolist()]
    for row in table.values.tolist():
        assert f"| {' | '.join(row)} |" in README


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:|#)([^)]+)\)", README))
def test_links_and_pictures_exist(target):
    assert (ROOT / target).exists()
