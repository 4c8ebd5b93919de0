"""Notebooks are thin, stripped, strictly parameterised, and run from their own folder."""

import ast
import dataclasses
from pathlib import Path

import nbformat
import papermill
import pytest

from kvlib.config import RunConfig

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
QUICK = {
    "00_quickstart": {},
    "80_train_reasoner": {"n_steps": 2},
    "90_train_predictor": {"n_traces": 60, "n_held_out": 8},
    "30_run": {"n_problems": 4, "batch_size": 4},
    "40_charts": {},
    "50_compare": {},
    "55_replay": {"n_traces": 1, "n_drills": 1, "kv_budgets": [96]},
    "57_real_weights": {},
    "60_your_policy": {"n_problems": 8, "kv_budgets": [136]},
    "70_throughput": {},
}
PICTURES = {
    "00_quickstart": 1,
    "90_train_predictor": 1,
    "40_charts": 4,
    "50_compare": 7,
    "55_replay": 4,
    "57_real_weights": 3,
    "60_your_policy": 1,
    "70_throughput": 1,
}


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin_stripped_and_has_one_cell_of_literal_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "strip the outputs"
    assert len(cells) <= 12
    source = "\n".join(cell.source for cell in cells)
    assert source.count("\n") <= 120
    # A policy of one's own is what that notebook is for.
    assert "def " not in source or path.stem == "60_your_policy", "logic belongs to kvlib"
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == cells[:1]
    for statement in ast.parse(tagged[0].source).body:
        ast.literal_eval(statement.value)
        assert isinstance(statement, ast.AnnAssign)


def test_the_run_notebook_takes_exactly_the_config_and_where_to_write():
    inferred = papermill.inspect_notebook(str(FOLDER / "30_run.ipynb"))
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    assert set(inferred) == fields | {"folder"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_own_folder(path, tmp_path):
    parameters = dict(QUICK[path.stem])
    if path.stem in ("30_run", "60_your_policy"):
        parameters["folder"] = str(tmp_path / "cell")
    done = papermill.execute_notebook(
        path, tmp_path / path.name, parameters, cwd=FOLDER, kernel_name="python3", progress_bar=False
    )
    pictures = sum("image/png" in o.get("data", {}) for cell in code_cells(done) for o in cell.outputs)
    assert pictures == PICTURES.get(path.stem, 0)
    noise = [
        output
        for cell in code_cells(done)
        for output in cell.outputs
        if output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    ]
    assert path.stem not in ("00_quickstart", "40_charts") or noise == [], "a warning or a progress bar"
