"""On PYTHONPATH, puts the stub cell.py and study/timing.py of this folder in the place of kvlib's own."""

from pathlib import Path

import kvlib.study

kvlib.__path__.insert(0, str(Path(__file__).parent))
kvlib.study.__path__.insert(0, str(Path(__file__).parent / "study"))
