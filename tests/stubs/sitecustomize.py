"""On PYTHONPATH, puts the stub run.py and timing.py of this folder in the place of kvlib's own."""

from pathlib import Path

import kvlib

kvlib.__path__.insert(0, str(Path(__file__).parent))
