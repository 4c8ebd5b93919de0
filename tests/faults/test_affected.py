"""What changed decides which cells are decoded again: exactly those that it can have changed."""

import dataclasses
import shutil

import nbformat
import pytest
from storm import ROOT
from test_cell import copy_of_tiny

from kvlib import cell as run
from kvlib import record
from kvlib.config import load_grid
from kvlib.study.layout import Study, cell_fingerprints, unfinished

GRID = """
study: small
model: {model}
datasets: [chain-a, chain-b]
policy: window
kv_budgets: [96]
full_cache: true
n_problems: 5
"""


@pytest.fixture
def studies(tmp_path):
    """Two studies, of one model each, whose every cell has a valid record."""
    (tmp_path / "model").mkdir()
    shutil.copy(ROOT / "notebooks" / "30_run.ipynb", tmp_path)
    made = []
    for number, model in enumerate(["tiny", copy_of_tiny(tmp_path / "model")]):
        path = tmp_path / f"grid{number}.yml"
        path.write_text(GRID.format(model=model))
        made.append(Study(load_grid(path), 0, tmp_path / f"runs{number}", tmp_path / "figures"))
        for folder, mark in cell_fingerprints(made[-1]).items():
            record.publish(folder, {"fingerprint": mark[0], "config": {}, "results": {}})
    yield made
    forget()


def forget() -> None:
    run.read_dataset.cache_clear()


def again(study) -> set[str]:
    """Which cells would be decoded again, as dataset/policy."""
    forget()
    return {"/".join(folder.parts[-4:-2]) for folder in unfinished(cell_fingerprints(study))}


ALL = {"chain-a/window", "chain-a/full", "chain-b/window", "chain-b/full"}


def test_nothing_changed(studies):
    assert [again(study) for study in studies] == [set(), set()]


@pytest.mark.parametrize("edit", ["a default", "a comment", "CRLF", "an empty cell", "prose"])
def test_the_notebook_decides_nothing(studies, edit):
    path = studies[0].notebook
    notebook = nbformat.read(path, 4)
    if edit == "a default":
        notebook.cells[1].source = notebook.cells[1].source.replace("kv_budget: int = 128", "kv_budget: int = 144")
    elif edit == "a comment":
        notebook.cells[2].source += "\n# mine"
    elif edit == "an empty cell":
        notebook.cells.append(nbformat.v4.new_code_cell())
    elif edit == "prose":
        notebook.cells[0].source += " More prose."
    nbformat.write(notebook, path)
    if edit == "CRLF":
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").replace(b"\\n", b"\\r\\n"))
    assert [again(study) for study in studies] == [set(), set()]


def test_one_answer_of_one_dataset(studies, monkeypatch):
    real = run.load_problems

    def load(name, n):
        problems = real(name, n)
        if name == "chain-b":
            problems[3] = dataclasses.replace(problems[3], answer="x")
        return problems

    monkeypatch.setattr(run, "load_problems", load)
    assert [again(study) for study in studies] == [{"chain-b/window", "chain-b/full"}] * 2


def test_one_byte_of_one_models_weights(studies):
    weights = studies[1].grid.path.parent / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [again(study) for study in studies] == [set(), ALL]


def test_one_setting_of_one_policy(studies):
    path = studies[0].grid.path
    path.write_text(path.read_text() + "policy_options: {n_recent: 20}\n")
    changed = Study(load_grid(path), 0, studies[0].runs, studies[0].figures)
    assert again(changed) == {"chain-a/window", "chain-b/window"}


def test_the_version_of_results(studies, monkeypatch):
    monkeypatch.setattr(record, "RESULT_VERSION", record.RESULT_VERSION + 1)
    assert [again(study) for study in studies] == [ALL, ALL]
