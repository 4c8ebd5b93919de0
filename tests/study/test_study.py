"""One command brings a study to its charts, from whatever was left, and says what stands in the way."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cell_command import HERE, alive, environment, lines, wait_until

import kvlib
from kvlib import record
from kvlib.config import load_grid
from kvlib.cost import clock
from kvlib.study import processes
from kvlib.study.draw import DRAWN_BY, code_of
from kvlib.study.layout import SNAKEFILE, python

GRID = """
study: small
datasets: [chain-a]
kv_budgets: [8]
full_cache: true
n_problems: 2
timing: {batch_size: 4, n_steps: 8, repeats: 3}
"""


@pytest.fixture
def home(tmp_path):
    """A folder with a grid and stub notebooks, at a path that needs quoting."""
    home = tmp_path / 'sp ace {x} ü #1: a\\"b'
    shutil.copytree(HERE / "notebooks", home / "notebooks")
    (home / "notebooks" / "tiny.yml").write_text(GRID)
    return home


def edit(home, old, new):
    path = home / "notebooks" / "tiny.yml"
    path.write_text(path.read_text().replace(old, new))


def start(home, do="charts", **environ):
    return subprocess.Popen(
        [sys.executable, "-m", "kvlib.study", do],
        cwd=home,
        env=environment(HOME="/proc/nohome", **environ),  # as in a container without a home
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background job ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(home, do="charts"):
    process = start(home, do)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def samples(home):
    return [
        sample
        for path in sorted((home / "runs").rglob("samples.jsonl"))
        for sample in record.load_samples(path)[1].values()
    ]


def test_from_grid_to_charts_then_nothing_then_what_changed(home):
    code, output = run(home, "status")
    assert code == 0 and "no run is at work" in output and "0 done, 0 running, 0 failed, 2 missing (of 2)" in output
    code, output = run(home)
    assert code == 0, output
    assert "0 of 2 cells done" in output and "cells 2 of 2, samples 4 of 4" in output
    assert str(home / "figures/small/s0/chart.png") in output and "charts.csv" in output
    assert re.search(r"2 cells, \d+ (s|min \d\d s) in all", output)
    assert not list(home.glob(".snakemake")) and not list((home / "notebooks").glob(".snakemake"))

    before = (home / "runs/small/snakemake.log").stat().st_mtime_ns
    code, output = run(home)
    assert code == 0 and "2 of 2 cells done" in output and "the charts are up to date" in output
    assert (home / "runs/small/snakemake.log").stat().st_mtime_ns == before

    code, output = run(home, "status")
    assert code == 0 and "2 done, 0 running" in output and "timing   1 of 1 done" in output
    code, output = run(home, "verify")
    assert code == 0 and "3 records and 4 samples are whole" in output
    code, output = run(home, "publish")
    assert code == 0 and "3 records and 2 chart files" in output
    published = home / "results" / "small"
    assert len(record.load_records(published)) == 2 and (published / "chart.png").exists()
    assert not list(published.rglob("samples*"))

    b8, full = home / "runs/small/chain-a/dynts/b8/s0", home / "runs/small/chain-a/full/bfull/s0"
    (full / "record.json").write_text("{")
    edit(home, "n_problems: 2", "n_problems: 3")
    code, output = run(home, "publish")
    assert code == 1 and "are not done" in output and "kvlib.study charts" in output
    code, output = run(home, "verify")
    assert code == 1 and str(full / "record.json") in output and "2 bad, 0 missing" in output
    code, output = run(home)
    assert code == 0 and "0 of 2 cells done" in output and "the charts are" not in output
    assert len(samples(home)) == 6 and record.read_record(full)["results"]["n_correct"] == 3
    assert (b8 / "samples.1.jsonl").exists() and (b8 / "record.1.json").exists()


def test_a_failed_cell_is_named_with_its_reason_and_the_others_finish(home):
    edit(home, "[chain-a]", "[broken, chain-a]")
    edit(home, "full_cache: true", "")
    code, output = run(home, "run")
    assert code == 1 and "1 of 2 cells failed" in output
    assert "broken/dynts/b8/s0: ValueError: the stub was asked to fail" in output
    assert "kvlib.study charts --grid" in output
    assert record.read_record(home / "runs/small/chain-a/dynts/b8/s0") and not (home / "figures").exists()


def test_one_engine_at_a_time_and_any_end_is_resumable(home):
    edit(home, "n_problems: 2", "n_problems: 25")
    edit(home, "[8]", "[8, 16]")
    cell = home / "runs/small/chain-a/dynts/b8/s0"
    first = start(home, STUB_SLEEP="0.1")
    wait_until(lambda: len(samples(home)) > 4)
    code, output = run(home)
    assert code == 75
    assert re.search(rf"small is in use by process {first.pid} on \S+ since \d{{4}}-", output)

    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 130 and "the same command continues" in output and "Traceback" not in output

    second = start(home, STUB_SLEEP="0.1")
    known = len(samples(home))
    wait_until(lambda: len(samples(home)) > known + 4)
    second.kill()
    second.communicate()
    kernels = {int(sample["output"]) for sample in samples(home)}
    code, output = run(home)  # at once, while orphans may be dying
    assert code == 0 and not any(alive(pid) for pid in kernels), output
    found = [sample["id"] for sample in record.load_samples(cell / "samples.jsonl")[1].values()]
    assert found == [f"chain-a/{number}/0" for number in range(25)]
    assert len(samples(home)) == 75 and lines(cell) == 26


def test_a_closed_pipe_ends_a_command_without_a_traceback(home):
    words = [sys.executable, "-u", "-m", "kvlib.study", "plan"]
    seen = subprocess.Popen(words, cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b"study small" in seen.stdout.readline()
    seen.stdout.close()
    assert seen.wait(timeout=60) in (0, 141) and b"Error" not in seen.stderr.read()


def test_charts_are_drawn_again_for_the_code_that_draws_and_for_no_other():
    """What notebook 40 imports of kvlib, and what that imports, is hashed: all but names, paths and files."""
    home = Path(kvlib.__file__).parent
    hashed = {path for pattern in DRAWN_BY for path in home.glob(pattern)}
    found, waiting = set(), re.findall(r"from kvlib\.(\S+) import", code_of(home.parent / "notebooks/40_charts.ipynb"))
    while waiting:
        path = home / f"{waiting.pop().replace('.', '/')}.py"
        if path.exists() and path not in found:
            found.add(path)
            waiting += re.findall(r"^from kvlib\.(\S+) import", path.read_text(), re.MULTILINE)
    assert found <= hashed | {home / name for name in ("errors.py", "files.py", "hub.py", "checkpoint.py")}
    assert not [path for path in hashed if {"study", "bench", "engine", "train"} & set(path.relative_to(home).parts)]


def test_bad_input_is_a_sentence_within_seconds(home):
    edit(home, "kv_budgets", "kv_bugdets")
    code, output = run(home)
    assert code == 2 and "did you mean kv_budgets?" in output and "tiny.yml" in output
    edit(home, "kv_bugdets", "kv_budgets")
    edit(home, "[chain-a]", "[nowhere]")
    code, output = run(home)
    assert code == 2 and "unknown dataset 'nowhere'" in output
    edit(home, "[nowhere]", "[chain-a]")
    edit(home, "full_cache: true", "")
    code, output = run(home)
    assert code == 2 and "the charts compare KV budgets and tiny.yml has one" in output and not samples(home)
    assert re.search("decode without charts: .+ -m kvlib.study run --grid notebooks/tiny.yml --seed 0\n", output)
    edit(home, "timing:", "full_cache: true\ntiming:")
    (home / "notebooks" / "30_run.ipynb").rename(home / "30_run.ipynb")
    code, output = run(home)
    assert code == 2 and "30_run.ipynb, through which cells run; have the grid file beside" in output
    (home / "30_run.ipynb").rename(home / "notebooks" / "30_run.ipynb")
    shutil.rmtree(home / "runs")
    (home / "runs").write_text("")
    code, output = run(home)
    assert code == 1 and "a file is where a folder must be" in output and "Traceback" not in output


def test_a_command_to_type_names_a_python_that_has_kvlib(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert python() == "python"
    other = tmp_path / "python"
    other.write_text("#!/bin/false")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(python()).absolute() == Path(sys.executable), "make needs no active environment"


def test_the_snakefile_works_without_the_study_command(home):
    plain = home.with_name("plain")  # Snakemake's own --config takes no # : or "
    plain.symlink_to(home)
    paths = [f"grid={plain}/notebooks/tiny.yml", f"runs={plain}/runs", "seed=3"]
    process = subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "-n", "--config", *paths],
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for path in ("chain-a/dynts/b8/s3", "chain-a/full/bfull/s3"):
        assert f"{path}/record.json" in process.stdout + process.stderr


def test_the_progress_line_counts_only_samples_of_this_config(tmp_path, home):
    cells = {tmp_path / cell.cell_path: cell for cell in load_grid(home / "notebooks/tiny.yml").cells()}
    prints = {folder: (f"f{number}",) for number, folder in enumerate(cells)}
    folder, other = list(cells)[:2]
    with (
        record.SampleLog(folder, {"fingerprint": "f0"}),
        record.SampleLog(other, {"fingerprint": "old"}) as log,
    ):
        progress = processes.Progress(cells, prints)
        assert "cells 0 of 2, samples 0 of 4, 0 s" in progress.line()
        made = {"answer": "1", "correct": True, "n_prompt": 3, "n_tokens": 5, "stop": "eos", "output": ""}
        log.append({"id": "a", "problem": 0, "sample": 0, **made})
        assert progress.samples() == 0
    with record.SampleLog(folder, {"fingerprint": "f0"}) as log:
        log.append({"id": "a", "problem": 0, "sample": 0, **made})
    progress.start -= 60
    assert re.search(r"samples 1 of 4, 1 min 00 s, about 3 min 00 s left", progress.line())
    assert [clock(5), clock(172), clock(3725)] == ["5 s", "2 min 52 s", "1 h 02 min"]


def test_what_a_study_starts_has_a_user_although_the_container_knows_no_name_for_it(tmp_path, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    nameless = "import getpass, pwd\npwd.getpwuid = {}.__getitem__  # KeyError, as for an unknown uid\n"
    (tmp_path / "nameless.py").write_text(nameless + "print(getpass.getuser())\n")
    with (
        open(tmp_path / "log", "wb") as log,
        processes.tied("nameless", output=log, PYTHONPATH=str(tmp_path)) as process,
    ):
        process.wait(60)
    assert (tmp_path / "log").read_text() == f"{os.getuid()}\n"
