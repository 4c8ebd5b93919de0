"""The gallery shows every notebook as it is now, in small files, and executes only what has changed."""

import nbformat
import pytest

from kvlib.charts import gallery

PAGES = gallery.ROOT / "docs" / "gallery"
CODE = """%matplotlib inline
import pandas as pd, sys
from kvlib.charts.sheet import show
from kvlib.charts.traces import slots_figure
print("no", "ise", sep="", file=sys.stderr)
show(slots_figure({"DynTS": range(9)}, 5, "m"), pd.DataFrame({"a": range(100)}))"""


@pytest.mark.skipif(not PAGES.exists(), reason="`make gallery` was never run")
def test_the_gallery_is_current():
    assert gallery.outdated(gallery.ROOT / "notebooks", PAGES) == [], "run `make gallery`"


def test_a_page_has_pictures_and_short_tables_and_is_made_once(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# A title"), nbformat.v4.new_code_cell(CODE)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebooks, pages = tmp_path / "notebooks", tmp_path / "pages"
    notebooks.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), notebooks / "01_one.ipynb")
    assert [path.stem for path in gallery.outdated(notebooks, pages)] == ["01_one"]
    gallery.page(notebooks / "01_one.ipynb", pages)
    assert gallery.outdated(notebooks, pages) == []
    text = (pages / "01_one.md").read_text()
    (picture,) = (pages / "01_one_files").iterdir()
    assert f"![png](01_one_files/{picture.name})" in text and picture.stat().st_size < 60_000
    assert "… and 86 more rows" in text and text.count("<tr") == 16 and "noise" not in text
    assert f"## [A title](01_one.md)\n\n[![01_one](01_one_files/{picture.name})](01_one.md)" in gallery.contents(pages)
    cells[0].source = "# Another title"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), notebooks / "01_one.ipynb")
    assert [path.stem for path in gallery.outdated(notebooks, pages)] == ["01_one"]
    (notebooks / "01_one.ipynb").unlink()
    assert gallery.outdated(notebooks, pages) == []
