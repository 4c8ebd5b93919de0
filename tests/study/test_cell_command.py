"""The cell command may be started, killed and repeated at will: it makes its record or says what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from kvlib import record
from kvlib.config import RunConfig
from kvlib.errors import ConfigError
from kvlib.study import cell_command as cell

HERE = Path(__file__).parents[1]
NOTEBOOK = HERE / "notebooks" / "30_run.ipynb"
NAMES = [*RunConfig.__dataclass_fields__, "folder"]


def environment(**more):
    paths = [str(HERE / "stubs"), str(Path(record.__file__).parent.parent)]  # the stub run.py, no model
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more


def command(folder, notebook=NOTEBOOK, **parameters):
    config = {"kv_budget": 8, "n_problems": 2} | parameters
    words = ["--notebook", str(notebook), "--folder", str(folder), "--config", json.dumps(config)]
    return [sys.executable, "-m", "kvlib.study.cell_command", *words]


def run(folder, notebook=NOTEBOOK, **parameters):
    return subprocess.run(
        command(folder, notebook, **parameters),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def lines(folder):
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_a_cell_runs_in_this_python_from_any_folder_and_is_skipped_when_done(tmp_path):
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text('{"argv": ["false"], "display_name": "x", "language": "python"}')
    folder = tmp_path / "sp ace {x} ü" / "cell"
    notebook = tmp_path / "sp ace {x} ü" / "note book.ipynb"
    notebook.parent.mkdir()
    shutil.copy(NOTEBOOK, notebook)
    process = subprocess.run(
        command(folder, notebook), env=environment(JUPYTER_PATH=str(tmp_path / "jupyter")), timeout=120
    )
    assert process.returncode == 0
    found = record.read_record(folder)
    assert found["results"]["n_correct"] == 2
    assert found["provenance"]["finished"]["command"].startswith(
        "python -m kvlib.study.cell_command --notebook 'note book.ipynb'"
    )
    before = (folder / "run.ipynb").stat().st_mtime_ns
    again = run(folder, notebook)
    assert again.returncode == 0 and "done already" in again.stdout
    assert (folder / "run.ipynb").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("dataset", "code", "message"),
    [
        ("broken", 1, "ValueError: the stub was asked to fail"),
        ("killed", 138, "died: killed, or out of memory"),
        ("silent", 65, "no valid record"),
        ("nowhere", 2, "unknown dataset 'nowhere'"),
    ],
)
def test_a_failure_has_its_exit_code_and_a_last_line_that_says_why(tmp_path, dataset, code, message):
    process = run(tmp_path / "cell", dataset=dataset)
    assert process.returncode == code
    assert message in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("text", ["{", "[1]", '{"kv_bugdet": 8}', '{"kv_budget": "8"}', '{"kv_budget": NaN}'])
def test_a_bad_config_is_refused_before_anything_is_written(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["cell", "--notebook", str(NOTEBOOK), "--folder", str(tmp_path / "c"), "--config", text]
    )
    monkeypatch.setattr(cell, "die_with_parent", lambda _: None)
    monkeypatch.setitem(sys.modules, "kvlib.cell", type(sys)("kvlib.cell"))
    sys.modules["kvlib.cell"].prepare = None
    assert cell.main() == 2
    assert capsys.readouterr().err and not (tmp_path / "c").exists()


def test_a_notebook_takes_exactly_the_parameters_it_is_given(tmp_path):
    cell.check_parameters(NOTEBOOK, NAMES)
    with pytest.raises(ConfigError, match=r"does not take kv_bugdet; .*tagged parameters"):
        cell.check_parameters(NOTEBOOK, [*NAMES, "kv_bugdet"])
    with pytest.raises(ConfigError, match="a parameter that nothing sets: seed"):
        cell.check_parameters(NOTEBOOK, [name for name in NAMES if name != "seed"])
    cell.check_parameters(NOTEBOOK, ["seed"], exactly=False)
    skipped = nbformat.read(NOTEBOOK, 4)
    skipped.cells[0].source = skipped.cells[0].source.replace("seed = 0", "seed = 0  # default=0")
    nbformat.write(skipped, tmp_path / "skipped.ipynb")
    with pytest.raises(ConfigError, match="does not take seed"):
        cell.check_parameters(tmp_path / "skipped.ipynb", NAMES)
    (tmp_path / "damaged.ipynb").write_text("{")
    with pytest.raises(ConfigError, match=r"damaged.ipynb is no notebook"):
        cell.check_parameters(tmp_path / "damaged.ipynb", NAMES)


def test_a_locked_cell_is_waited_for_naming_the_holder(tmp_path):
    with record.locked(tmp_path / ".lock"):
        process = subprocess.Popen(command(tmp_path), env=environment(), stdout=subprocess.PIPE, text=True)
        assert f"in use by process {os.getpid()}" in process.stdout.readline()
        assert not (tmp_path / "run.ipynb").exists()
    assert process.wait(timeout=120) == 0
    assert record.read_record(tmp_path)


@pytest.mark.parametrize("victim", ["cell", "its parent"])
def test_a_killed_cell_takes_its_kernel_along_and_continues(tmp_path, victim):
    slow = environment(STUB_SLEEP="0.04")
    start = command(tmp_path, n_problems=60)
    parent = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
    outer = subprocess.Popen([sys.executable, "-c", parent, *start], env=slow, stdout=subprocess.PIPE)
    pid = int(outer.stdout.readline())
    wait_until(lambda: lines(tmp_path) > 5)
    kernel = int(next(iter(record.load_samples(tmp_path / "samples.jsonl")[1].values()))["output"])
    assert alive(kernel)
    os.kill(pid if victim == "cell" else outer.pid, signal.SIGKILL)
    again = subprocess.Popen(start, env=slow)  # at once, while the orphaned kernel may still write
    wait_until(lambda: not alive(kernel) and not alive(pid), 15)
    assert again.wait(timeout=120) == 0
    outer.wait()
    samples = list(record.load_samples(tmp_path / "samples.jsonl")[1].values())
    assert [sample["problem"] for sample in samples] == list(range(60))
    writers = [sample["output"] for sample in samples]
    assert len(set(writers)) == 2 and writers == sorted(writers, key=writers.index)
    assert record.read_record(tmp_path)["results"]["n_correct"] == 60
