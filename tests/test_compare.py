"""A comparison decodes every cell once, continues after a kill, and publishes verdicts that can be compared."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kvlib.charts.arms import cells_table
from kvlib.compare import load_cells, load_comparison, load_verdicts, main
from kvlib.config import load_grid, parse_grid
from kvlib.errors import ConfigError
from kvlib.record import load_samples
from kvlib.stats import differences_to
from kvlib.study.decode import work
from kvlib.study.layout import Study, present
from kvlib.study.timing import costed_cells

GRID = Path(__file__).parent.parent / "notebooks" / "compare.yml"
CONTENT = {
    "study": "small",
    "decoding": {"n_problems": 6, "max_new_tokens": 48, "batch_size": 6, "threads": 1},
    "common": {"n_sink": 2, "n_recent": 8, "buffer": 4},
    "arms": {"random": {"policy": "random"}, "recency": {"policy": "window"}},
    "stages": {
        "screening": {
            "models": ["tiny"],
            "arms": "all",
            "datasets": ["chain-a"],
            "kv_budgets": [64],
            "protect_prompt": [True],
            "seeds": [0],
        }
    },
}


def compared(content):
    return parse_grid(content, Path("compare.yml")).comparison


def written(folder: Path, **stage) -> Path:
    content = json.loads(json.dumps(CONTENT))
    content["stages"]["screening"].update(stage)
    path = folder / "compare.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(grid: Path, folder: Path, do: str) -> list[str]:
    return [sys.executable, "-m", "kvlib.compare", do, "--grid", str(grid), "--runs", str(folder / "runs"),
            "--results", str(folder / "results"), "--jobs", "2"]  # fmt: skip


def samples_of(folder: Path) -> dict[str, dict]:
    found = {}
    for path in sorted((folder / "runs" / "small").rglob("samples.jsonl")):
        _, samples, _ = load_samples(path)
        for name, sample in samples.items():
            found[f"{path.parent.relative_to(folder)} {name}"] = sample
    return found


def test_arms_meet_under_equal_terms_and_cells_of_two_stages_are_one():
    content = json.loads(json.dumps(CONTENT))
    content["stages"]["again"] = {**content["stages"]["screening"], "protect_prompt": [True, False]}
    cells = compared(content).cells
    assert [cell.path for cell in cells] == [
        "tiny/chain-a/full/full/s0",
        "tiny/chain-a/random+prompt/b64/s0",
        "tiny/chain-a/recency+prompt/b64/s0",
        "tiny/chain-a/random/b64/s0",
        "tiny/chain-a/recency/b64/s0",
    ]
    for cell in cells[1:]:
        assert cell.config.policy_options == {**CONTENT["common"], "protect_prompt": cell.protected}


def test_more_samples_are_more_seeds_and_leave_the_others_as_they_are():
    content = json.loads(json.dumps(CONTENT))
    one = {cell.path: cell.config for cell in compared(content).cells}
    content["stages"]["screening"]["seeds"] = [0, 1]
    two = {cell.path: cell.config for cell in compared(content).cells}
    assert one.items() <= two.items()
    assert len(two) == 2 * len(one)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("arms"), "the key 'arms' is missing"),
        (lambda c: c["stages"]["screening"].pop("seeds"), "the key of stage screening 'seeds' is missing"),
        (lambda c: c.update(arm=c["arms"]), "unknown key 'arm'; did you mean arms"),
        (lambda c: c["stages"].clear(), "the comparison has no cell"),
        (lambda c: c["stages"]["screening"].update(arms=["rand"]), "names the arm 'rand'; known: random, recency"),
        (lambda c: c["stages"]["screening"].update(budgets=[3]), "unknown key of stage screening 'budgets'"),
        (lambda c: c["decoding"].update(max_new_tokens="9"), "max_new_tokens='9'"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(change, sentence):
    content = json.loads(json.dumps(CONTENT))
    change(content)
    with pytest.raises(ConfigError, match=sentence):
        compared(content)


def test_a_killed_comparison_continues_to_the_same_verdicts(tmp_path):
    disturbed, whole = tmp_path / "disturbed", tmp_path / "whole"
    for folder in (disturbed, whole):
        folder.mkdir()
        written(folder)
    engine = subprocess.Popen(command(disturbed / "compare.yml", disturbed, "run"), start_new_session=True)
    deadline = time.monotonic() + 120
    while not samples_of(disturbed) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(engine.pid, signal.SIGKILL)
    engine.wait()
    assert samples_of(disturbed), "it was killed at work"
    refused = subprocess.run(command(disturbed / "compare.yml", disturbed, "publish"), capture_output=True, text=True)
    # A comparison so small may be done already when it is killed.
    assert refused.returncode == 0 or "not done" in refused.stderr
    for folder in (disturbed, whole):
        done = subprocess.run(command(folder / "compare.yml", folder, "run"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "cells 3 of 3, samples 18 of 18" in done.stdout or "3 of 3 cells done" in done.stdout
    assert len(samples_of(whole)) == 18
    assert samples_of(disturbed) == samples_of(whole)

    for do in ("publish", "cost"):
        done = subprocess.run(command(whole / "compare.yml", whole, do), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    verdicts = load_verdicts(whole / "results")
    assert len(verdicts) == 18
    n_correct = sum(sample["correct"] for sample in samples_of(whole).values())
    assert verdicts["correct"].sum() == n_correct
    cells = load_cells(whole / "results")
    assert cells_table(cells)["Arm"].tolist() == ["random+prompt", "recency+prompt", "full cache"]
    assert (cells["round_us_per_row"].dropna() > 0).all()
    evicted = verdicts.dropna(subset="kv_budget").rename(columns={"seed": "sample"})
    assert differences_to(evicted, "random")["n_problems"].tolist() == [6]


def test_a_setting_that_cannot_run_is_told_before_anything_is_decoded(tmp_path, monkeypatch, capsys):
    grid = written(tmp_path, kv_budgets=[8])
    monkeypatch.setattr(sys, "argv", ["compare", *command(grid, tmp_path, "run")[3:]])
    monkeypatch.chdir(tmp_path)
    assert main("python -m kvlib.compare", str(grid)) == 2
    assert "kv_budget 8" in capsys.readouterr().err
    assert not samples_of(tmp_path)


def test_the_shipped_comparison_is_sound():
    from kvlib.cell import prepare

    comparison = load_comparison(GRID)
    settings = {(cell.config.policy, json.dumps(cell.config.policy_options)): cell for cell in comparison.cells}
    for cell in settings.values():
        if cell.config.model == "tiny":
            prepare(cell.config)


def test_every_arm_of_the_shipped_comparison_is_timed_at_one_budget():
    comparison = load_comparison(GRID)
    arms = costed_cells(comparison.cells)
    assert arms.keys() == {cell.arm for cell in comparison.cells}
    assert {config.kv_budget for config in arms.values()} == {136, None}


def test_cells_of_a_model_that_is_not_there_are_left_out_with_the_way_to_get_it():
    content = json.loads(json.dumps(CONTENT))
    content["stages"]["seeds"] = {**content["stages"]["screening"], "models": ["./nowhere/weights"]}
    grid, left_out = present(parse_grid(content, Path("books/compare.yml")))
    assert {cell.config.model for cell in grid.comparison.cells} == {"tiny"}
    (said,) = left_out
    assert "3 cells left out" in said and "make tiny-model TRAIN_SEED=8" in said and "./nowhere/weights" in said
    assert said.endswith("--out books/nowhere/weights"), "where the grid looks, as seen from here"
    content["stages"].pop("screening")
    with pytest.raises(ConfigError, match="no model of the comparison is there"):
        present(parse_grid(content, Path("compare.yml")))


def test_a_cell_that_fails_does_not_stop_the_others_and_status_says_why(tmp_path, monkeypatch, capsys):
    import kvlib.cell

    def fails_once(config, folder):
        if config.policy == "random":
            raise IndexError("a bug in a policy")
        return {"results": {"pass_at_1": 0.5}}

    monkeypatch.setattr(kvlib.cell, "run", fails_once)
    study = Study(load_grid(written(tmp_path)), 0, tmp_path / "runs", tmp_path)
    assert work(study) == 1
    said = capsys.readouterr().out
    assert "random+prompt/b64/s0 failed" in said and "a bug in a policy" in said
    assert "recency+prompt/b64/s0: 50.0 %" in said
    monkeypatch.setattr(sys, "argv", ["compare", *command(tmp_path / "compare.yml", tmp_path, "status")[3:]])
    monkeypatch.chdir(tmp_path)
    assert main("python -m kvlib.compare", "compare.yml") == 0
    said = capsys.readouterr().out
    assert "0 done, 0 running, 1 failed, 2 missing (of 3)" in said
    assert "failed   tiny/chain-a/random+prompt/b64/s0, 0 of 6 samples: IndexError: a bug in a policy" in said


def test_a_grid_without_arms_is_no_comparison():
    with pytest.raises(ConfigError, match=r"tiny\.yml has no arms and stages"):
        load_comparison(GRID.with_name("tiny.yml"))


def test_results_that_are_not_there_are_asked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"`python -m kvlib\.compare` run, then publish, cost and replay"):
        load_verdicts(tmp_path)
