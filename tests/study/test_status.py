"""A study's status is read from its files, whoever writes them at the moment."""

import math
import subprocess
import sys

import pytest

from kvlib.config import RunConfig
from kvlib.record import SampleLog, publish
from kvlib.study.status import CellState, cell_state, status_text, time_left

CONFIG = RunConfig(kv_budget=8, n_problems=4)
SAMPLE = {"answer": "1", "correct": True, "n_prompt": 3, "n_tokens": 5, "stop": "eos", "output": ""}


def decoded(folder, n, mark="m"):
    with SampleLog(folder, {"fingerprint": mark, "config": CONFIG.parameters()}) as log:
        for i in range(n):
            log.append({"id": f"p/{i}/0", "problem": f"p/{i}", "sample": 0, **SAMPLE})


def finished(folder, mark="m"):
    cost = {"seconds": 30.0, "resumed_samples": 1}
    publish(folder, {"fingerprint": mark, "config": CONFIG.parameters(), "results": {"n_samples": 4}, "cost": cost})


def state(tmp_path, mark="m", since=None):
    return cell_state(tmp_path, tmp_path / "a", CONFIG, mark and (mark,), 4, since)


def test_from_nothing_to_done(tmp_path):
    assert state(tmp_path) == CellState("a", "missing", 0, 4)
    decoded(tmp_path / "a", 2)
    assert state(tmp_path) == CellState("a", "missing", 2, 4)
    assert state(tmp_path, mark=None).done == 2
    assert state(tmp_path, mark="another").done == 0
    finished(tmp_path / "a")
    assert state(tmp_path) == CellState("a", "done", 4, 4, "", 30.0, 3)
    assert state(tmp_path, mark=None).state == "done"
    assert "with other settings" in state(tmp_path, mark="another").note
    path = tmp_path / "a" / "record.json"
    path.write_text(path.read_text().replace("30.0", "31.0"))
    found = state(tmp_path)
    assert found.state == "missing" and "was damaged or edited" in found.note


def test_a_failed_cell_says_why_and_a_running_one_is_no_failure(tmp_path):
    decoded(tmp_path / "a", 1)
    log = tmp_path / "a" / "run.log"
    log.write_text("loading\nkvlib.cell: the kernel died: killed,\n or out of memory\n")
    assert state(tmp_path) == CellState("a", "failed", 1, 4, "the kernel died: killed, or out of memory")
    log.write_text("Traceback (most recent call last):\nValueError: what\n")
    assert state(tmp_path).note == "ValueError: what"
    log.write_text("")
    assert state(tmp_path).state == "missing"
    assert state(tmp_path, since=log.stat().st_mtime - 1).state == "running"  # still loading
    assert state(tmp_path, since=log.stat().st_mtime + 1).state == "missing"
    code = "import sys, pathlib; from kvlib.record import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "a" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        holder = (tmp_path / "a" / ".lock").read_text()
        assert state(tmp_path) == CellState("a", "running", 1, 4)
        assert f"process {process.pid} " in holder and (tmp_path / "a" / ".lock").read_text() == holder
        process.stdin.close()
    assert state(tmp_path).state == "missing"
    assert (tmp_path / "a" / ".lock").read_text() == holder  # who held it last, not who asked


def test_time_left_comes_from_finished_cells_else_from_the_plan():
    cells = [CellState("a", "missing", 1, 4), CellState("b", "missing", 0, 4)]
    assert time_left(cells, math.nan, 1) == ""
    assert time_left(cells, 80.0, 1) == "about 1 min 10 s of decoding, reckoned from the plan"
    cells.append(CellState("c", "done", 4, 4, "", 30.0, 3))
    assert time_left(cells, 80.0, 2) == "about 35 s of decoding, reckoned from the finished cells"
    assert time_left(cells[2:], 80.0, 2) == ""
    assert time_left([CellState("a", "missing", 0, None)], 80.0, 1) == ""


@pytest.mark.parametrize("engine", [True, False])
def test_the_text_names_what_runs_and_what_failed(engine):
    cells = [CellState("a", "done", 4, 4), CellState("b", "failed", 1, 4, "no memory"), CellState("c", "running", 2, 4)]
    text = status_text("s", cells, [CellState("t", "done")], engine, "about 1 h 00 min", "")
    assert "1 done, 1 running, 1 failed, 0 missing (of 3)" in text and "samples  7 of 12" in text
    assert "failed   b, 1 of 4 samples: no memory" in text and "running  c, 2 of 4 samples" in text
    assert ("a run is at work" in text) == engine and "timing   1 of 1 done" in text
