"""Cells and samples that an older kvlib made, whose fingerprint held the run notebook's text, are continued."""

import shutil
from pathlib import Path

import pytest

from kvlib.cell import NOTEBOOK_OF_OLD, run, run_fingerprints
from kvlib.config import RunConfig, load_grid
from kvlib.record import fingerprint, read_record
from kvlib.study.layout import Study, cell_fingerprints, unfinished
from kvlib.study.status import cell_states

MADE = Path(__file__).parent / "made_by_9525fce"  # by that commit: one cell done, one killed after half its samples


@pytest.fixture
def study(tmp_path):
    shutil.copytree(MADE / "chain-a", tmp_path / "runs" / "old" / "chain-a")
    return Study(load_grid(MADE / "old.yml"), 0, tmp_path / "runs", tmp_path / "figures")


def test_what_an_older_kvlib_finished_is_done_and_what_it_began_is_continued(study, tmp_path):
    states = {state.name: (state.state, state.done) for state in cell_states(study, cell_fingerprints(study))}
    assert states == {"chain-a/dynts/b96/s0": ("done", 6), "chain-a/dynts/b128/s0": ("missing", 3)}
    (half,) = unfinished(cell_fingerprints(study))
    before = (half / "samples.jsonl").read_bytes()
    record = run(study.cells[half], half)
    assert record["cost"]["resumed_samples"] == 3 and record["results"]["n_samples"] == 6
    assert (half / "samples.jsonl").read_bytes().startswith(before)
    assert not unfinished(cell_fingerprints(study))
    assert {path.name for path in half.iterdir()} == {"samples.jsonl", "record.json", ".samples.lock"}
    undisturbed = run(study.cells[half], tmp_path / "undisturbed")
    assert {**undisturbed["results"], "n_rounds": 0} == {**read_record(half)["results"], "n_rounds": 0}
    assert undisturbed["verdicts"] == record["verdicts"]
    assert undisturbed["fingerprint"] == run_fingerprints(study.cells[half])[0] != record["fingerprint"]


def test_anything_that_decides_samples_still_outdates_them(study):
    config = study.cells[study.folder / "chain-a/dynts/b96/s0"]
    mark = read_record(study.folder / config.cell_path)["fingerprint"]
    assert mark == run_fingerprints(config)[1]
    for change in ({"seed": 1}, {"temperature": 0.7}, {"n_problems": 5}, {"policy_options": {"n_recent": 16}}):
        assert mark not in run_fingerprints(RunConfig(**{**config.parameters(), **change}))


def test_only_the_one_notebook_of_the_older_kvlib_is_accepted(monkeypatch):
    parts = []
    monkeypatch.setattr("kvlib.cell.fingerprint", lambda given: parts.append(given) or fingerprint(given))
    run_fingerprints(RunConfig(kv_budget=96))
    assert [part["notebook"] for part in parts] == ["", NOTEBOOK_OF_OLD]
