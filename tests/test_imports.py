"""Imports go one way, and charts need no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    {"kernels"},
    {"errors", "files", "config", "cost", "record", "tensors", "stats", "bootstrap", "checkpoint", "hub"},
    {"policies", "tasks"},
    {"engine"},
    {"models", "gguf"},
    {"fitted"},
    {"cell", "replay", "invariants", "prompts"},
    {"train"},
    {"api"},
    {"transformers_entry"},
    {"charts"},
    {"study"},
    {"bench"},
    {"compare"},
]
"""A room imports its own and those above it in this list."""
TORCH_FREE = ["hub", "config", "record", "stats", "tasks.chains", "tasks.datasets", "tasks.grade", "tasks.rows"]
TORCH_FREE += ["tasks.answers", "tasks.equality", "charts.measured", "charts.tables", "charts.traces", "charts.arms"]
TORCH_FREE += ["charts.throughput", "charts.report", "study.plan", "study.preflight", "study.status", "study.verify"]
TORCH_FREE += ["charts.sheet", "charts.answer", "charts.published", "charts.pairs", "charts.replays", "charts.gallery"]
TORCH_FREE += ["study.__main__", "study.gpus", "study.cell_command"]


def imported_rooms(path: Path) -> set[str]:
    """First-level kvlib modules that a source file imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("kvlib.")}
    return rooms


def room_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(ROOT / "kvlib").parts[0].removesuffix(".py")


SOURCES = [p for folder in ("kvlib", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_its_own_room_or_one_below(path):
    room = room_of(path)
    if room == "__init__":
        return
    level = next(i for i, rooms in enumerate(LEVELS) if room in rooms)
    allowed = set().union(*LEVELS[: level + 1])
    assert imported_rooms(path) <= allowed, f"{room} may not import {imported_rooms(path) - allowed}"
    if room == "kernels":
        assert imported_rooms(path) <= {"kernels"}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_charts_need_no_torch(module):
    code = f"import sys, kvlib.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_the_folder_kernels_does_not_pass_for_the_hub_package():
    """transformers probes a package called kernels; from the repository root it finds this folder."""
    code = "import kernels, transformers; from transformers import Qwen2ForCausalLM; print(kernels.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "0.0.0"), done.stderr
