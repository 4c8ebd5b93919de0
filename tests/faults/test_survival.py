"""Real processes hang, fail to start, run out of room or are killed: a sentence, an exit code, and no sample lost."""

import os
import signal
import subprocess
import sys

import pytest
from storm import Storm
from test_cell_command import alive, command, environment, lines, wait_until
from test_damage import fill_up, small_disk
from test_study import edit, home, run, samples

from kvlib import record
from kvlib.study import cell_command as cell
from kvlib.study.layout import SNAKEFILE
from kvlib.study.processes import TIED

__all__ = ["home", "small_disk"]


def finish(words, **more):
    return subprocess.run(words, env=environment(**more), capture_output=True, text=True, timeout=120)


def kernel_of(folder) -> int:
    """The stub writes its process id as the output of each sample."""
    return int(next(iter(record.load_samples(folder / "samples.jsonl")[1].values()))["output"])


@pytest.mark.parametrize("how", ["hung", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_hung_kernel_is_stopped_at_the_time_limit_and_marked(tmp_path, how):
    done = finish(command(tmp_path, dataset=how), KVLIB_TIME_LIMIT="4")
    assert done.returncode == 124
    assert "stopped at its time limit of 4 s" in done.stderr.splitlines()[-1]
    failure = cell.read_failure(tmp_path)
    assert failure["code"] == 124 and "time limit" in failure["reason"] and len(failure["fingerprint"]) == 64
    assert not alive(kernel_of(tmp_path)) and not (tmp_path / "record.json").exists() and lines(tmp_path) == 2


@pytest.mark.slow
def test_a_kernel_that_cannot_start_is_a_sentence(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ipykernel_launcher.py").write_text("raise ImportError('no ipykernel here')")
    paths = os.pathsep.join([str(tmp_path / "broken"), environment()["PYTHONPATH"]])
    done = finish(command(tmp_path / "cell"), PYTHONPATH=paths)
    assert done.returncode == 138 and "did not start" in done.stderr.splitlines()[-1]
    assert "no ipykernel here" in done.stderr  # in run.log, above
    assert cell.read_failure(tmp_path / "cell")["code"] == 138


@pytest.mark.slow
def test_a_home_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "home").write_text("")  # a file, so that root fails too
    assert finish(command(tmp_path / "cell"), HOME=str(tmp_path / "home")).returncode == 0
    assert record.read_record(tmp_path / "cell")


def test_a_process_whose_parent_died_before_it_looked_ends(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert finish([*command(tmp_path, dataset="hung"), "--parent", str(gone.pid)]).returncode == 143
    slept = [sys.executable, "-c", TIED, str(gone.pid), "timeit", "-n", "1", "-s", "import time", "time.sleep(60)"]
    assert finish(slept).returncode == 143


@pytest.mark.slow
def test_no_room_on_the_gpu_has_its_own_code_and_is_not_tried_twice_by_one_engine(home):
    edit(home, "[chain-a]", "[full-gpu, chain-a]")
    edit(home, "full_cache: true", "")
    code, output = run(home, "run")
    assert code == 1 and "1 of 2 cells failed" in output and "the GPU has no room, not even for half" in output
    failed = home / "runs/small/full-gpu/dynts/b8/s0"
    assert cell.read_failure(failed)["code"] == 77 and not (failed / "record.json").exists()
    assert (failed / "tries").read_text() == "x" and lines(failed) == 2
    assert record.read_record(home / "runs/small/chain-a/dynts/b8/s0")
    assert not (home / "runs/small/chain-a/dynts/b8/s0/failed.json").exists()
    code, output = run(home, "run")  # typed again, it is tried again: another process may have held the GPU
    assert (failed / "tries").read_text() == "xx"


@pytest.mark.slow
def test_a_cell_on_a_full_disk_says_so_and_continues_when_there_is_room(small_disk):
    folder = small_disk / "cell"
    words = command(folder, n_problems=300)
    fill_up(small_disk, leave=48 * 1024)
    done = finish(words)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and ("disk is full" in last or "No space left" in last), last
    kept = len(record.load_samples(folder / "samples.jsonl")[1])
    assert 0 < kept < 300
    (small_disk / "filler").unlink()
    done = finish(words)
    assert done.returncode == 0, done.stderr
    found = [one["output"] for one in record.load_samples(folder / "samples.jsonl")[1].values()]
    assert len(found) == 300 and found.count(found[0]) == kept


@pytest.mark.slow
def test_a_terminated_cell_ends_at_once_with_its_kernel(tmp_path):
    process = subprocess.Popen(command(tmp_path, dataset="hung"), env=environment())
    wait_until(lambda: lines(tmp_path) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
    wait_until(lambda: not alive(kernel_of(tmp_path)), 10)


@pytest.mark.slow
def test_two_engines_on_one_folder_decode_each_sample_once(home):
    edit(home, "n_problems: 2", "n_problems: 12")
    words = [sys.executable, "-m", "snakemake", "--snakefile", SNAKEFILE, "--cores", "2", "--nolock", "--nocolor"]
    words += ["--config", f"grid={home}/notebooks/tiny.yml", f"runs={home}/runs"]
    both = [
        subprocess.Popen(list(map(str, words)), env=environment(STUB_SLEEP="0.1"), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for engine in both:
        assert engine.communicate(timeout=300) and engine.returncode == 0
    assert len(samples(home)) == 24 and not list(home.rglob("samples.*.jsonl"))
    for folder in (home / "runs/small/chain-a").glob("*/*/s0"):
        assert record.read_record(folder) and lines(folder) == 13


def test_a_small_storm_of_kills_loses_nothing(home):
    """The storm with the tiny model and many more kills is `make test-faults`."""
    edit(home, "n_problems: 2", "n_problems: 10")
    storm = Storm(home, environment(STUB_SLEEP="0.05"), kills=3, pause=(0.2, 2.0), seed=3)
    storm.run(0)
    storm.judge(sorted((home / "runs/small/chain-a").glob("*/*/s0")), [f"{number}/0" for number in range(10)])
    storm.count_orphans()
    tally = storm.tally
    assert (tally.kills.total(), tally.cells, tally.samples) == (3, 2, 20)
    assert (tally.lost, tally.doubled, tally.damaged, tally.rotated, tally.orphans) == (0, 0, 0, 0, 0), tally
