"""Finished samples are never lost, repeated or trusted when damaged; a record is whole or not there."""

import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlib import record
from kvlib.record import LockedError, RecordError, SampleLog

HEADER = {"fingerprint": "f1", "config": {"seed": 0}, "provenance": {"python": "3"}}
BODY = {"fingerprint": "f1", "config": {"dataset": "chain-a", "policy_options": {"ratio": 0.8}}}
BODY |= {"results": {"n_correct": 3, "kv_bytes": 1.5}}


def sample(number, output="text with ünïcode and \u2028 and \ud800"):
    made = {"id": f"chain-a/{number}/0", "problem": number, "sample": 0, "output": output, "answer": None}
    return made | {"correct": False, "n_prompt": 7, "n_tokens": 5, "stop": "length"}


def fill(folder, numbers, header=HEADER):
    with SampleLog(folder, header) as log:
        for number in numbers:
            log.append(sample(number))
    return folder / "samples.jsonl"


def done(folder, header=HEADER):
    with SampleLog(folder, header) as log:
        return log.done


def test_samples_come_back_as_they_were(tmp_path):
    fill(tmp_path, range(2))
    fill(tmp_path, [2])
    assert list(done(tmp_path).values()) == [sample(0), sample(1), sample(2)]


def test_the_header_keeps_the_provenance_of_generation(tmp_path):
    fill(tmp_path, [0])
    with SampleLog(tmp_path, {**HEADER, "provenance": {"python": "4"}}) as log:
        assert log.header["provenance"] == {"python": "3"}


def test_any_flipped_byte_in_a_middle_line_is_found(tmp_path):
    path = fill(tmp_path, range(2))
    whole = path.read_bytes()
    start, end = whole.index(b"\n") + 1, whole[:-1].rindex(b"\n")
    for at in range(start, end):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(RecordError, match=r"samples.jsonl:2 is damaged.*move it away"):
            done(tmp_path)
    assert path.stat().st_size == len(whole)


def test_a_repeated_sample_is_an_error(tmp_path):
    path = fill(tmp_path, range(2))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(RecordError, match=r"samples.jsonl:4 repeats the sample chain-a/0/0"):
        done(tmp_path)
    path.unlink()
    with SampleLog(tmp_path, HEADER) as log, pytest.raises(RecordError, match="there already"):
        log.append(sample(0))
        log.append(sample(0))


def test_a_sample_with_a_missing_field_is_refused(tmp_path):
    with SampleLog(tmp_path, HEADER) as log, pytest.raises(RecordError, match="stop"):
        log.append({name: value for name, value in sample(0).items() if name != "stop"})


def test_another_fingerprint_moves_samples_and_record_aside(tmp_path):
    for number in (1, 2, 3):
        path = fill(tmp_path, range(number), {**HEADER, "fingerprint": f"f{number}"})
        record.publish(tmp_path, BODY)
    assert sorted(p.name for p in tmp_path.glob("[rs]*")) == [
        "record.1.json", "record.2.json", "record.json", "samples.1.jsonl", "samples.2.jsonl", "samples.jsonl"
    ]  # fmt: skip
    counts = [len(record.load_samples(tmp_path / f"samples.{name}jsonl")[1]) for name in ("1.", "2.", "")]
    assert counts == [1, 2, 3] and path.exists()


def test_a_failed_write_leaves_no_half_line(tmp_path, monkeypatch):
    with SampleLog(tmp_path, HEADER) as log:
        log.append(sample(0))
        whole = log.path.read_bytes()

        def full(_):
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RecordError, match=r"disk is full.*samples are kept"):
            log.append(sample(1))
        monkeypatch.undo()
        assert log.path.read_bytes() == whole and list(log.done) == ["chain-a/0/0"]
        log.append(sample(1))
    assert len(done(tmp_path)) == 2


def test_a_record_comes_back_as_it_was(tmp_path):
    fill(tmp_path, range(2))
    made = record.publish(tmp_path, BODY)
    assert record.read_record(tmp_path) == made and BODY.items() <= made.items()
    assert record.is_done(tmp_path, {"f1"}) and not record.is_done(tmp_path, {"f2"})


def test_any_edit_of_a_record_or_its_samples_is_found(tmp_path):
    samples = fill(tmp_path, range(2))
    record.publish(tmp_path, BODY)
    path, whole = tmp_path / "record.json", (tmp_path / "record.json").read_text()
    for edited in (whole.replace('"n_correct": 3', '"n_correct": 4'), whole[:-20], "", "[]", "{}"):
        path.write_text(edited)
        with pytest.raises(RecordError, match=r"record.json .*Run the study again"):
            record.read_record(tmp_path)
        assert not record.is_done(tmp_path, {"f1"})
    path.write_text(whole)
    samples.write_bytes(samples.read_bytes()[:-1])
    with pytest.raises(RecordError, match=r"samples.jsonl is not the file"):
        record.read_record(tmp_path)
    samples.unlink()
    assert record.is_done(tmp_path, {"f1"})


def test_a_missing_record_is_a_sentence(tmp_path):
    with pytest.raises(RecordError, match="has not finished"):
        record.read_record(tmp_path / "nowhere")


@pytest.mark.parametrize("step", range(4))
def test_a_crash_at_any_step_of_publishing_leaves_the_old_or_the_new(tmp_path, monkeypatch, step):
    record.publish(tmp_path, BODY)
    calls = []

    def crashing(name):
        real = getattr(os, name)

        def call(*arguments):
            if len(calls) == step:
                raise KeyboardInterrupt
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "chmod", "replace"):
        crashing(name)
    with pytest.raises(KeyboardInterrupt):
        record.publish(tmp_path, {**BODY, "fingerprint": "f2"})
    monkeypatch.undo()
    assert calls == ["fsync", "chmod", "replace", "fsync"][:step]
    assert record.read_record(tmp_path)["fingerprint"] == ("f1" if step < 3 else "f2")
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_record_with_nan_is_refused(tmp_path):
    with pytest.raises(RecordError, match="JSON"):
        record.publish(tmp_path, {**BODY, "results": {"x": float("nan")}})


def test_a_file_in_place_of_the_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cell"):
        for use in (lambda f: SampleLog(f, HEADER), lambda f: record.publish(f, BODY)):
            with pytest.raises(RecordError, match="a file is where a folder must be"):
                use(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permissions")
def test_a_read_only_folder_is_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    for use in (lambda: SampleLog(tmp_path, HEADER), lambda: record.publish(tmp_path, BODY)):
        with pytest.raises(RecordError, match="permission denied: make the folder yours or choose another"):
            use()


def test_records_become_flat_rows_of_one_kind(tmp_path):
    record.publish(tmp_path / "b", {**BODY, "config": {**BODY["config"], "n_problems": None}})
    record.publish(tmp_path / "a", {**BODY, "results": {"n_correct": 1, "n_problems": 9}})
    record.publish(tmp_path / "t", {**BODY, "kind": "timing"})
    frame = record.load_records(tmp_path)
    assert list(frame["n_correct"]) == [1, 3] and frame["n_problems"][0] == 9
    assert list(frame["policy_options.ratio"]) == [0.8, 0.8] and frame["folder"][0] == str(tmp_path / "a")
    assert len(record.load_records(tmp_path, kind="timing")) == 1
    (tmp_path / "a" / "record.json").write_text("{")
    with pytest.raises(RecordError):
        record.load_records(tmp_path)


def test_a_folder_that_is_not_there_is_no_empty_table(tmp_path):
    assert len(record.load_records(tmp_path)) == 0
    with pytest.raises(RecordError, match=r"there is no folder .*nowhere; check the path"):
        record.load_records(tmp_path / "nowhere")


def test_samples_of_an_older_fingerprint_of_the_same_cell_are_continued(tmp_path):
    fill(tmp_path, range(2))
    with SampleLog(tmp_path, {"fingerprint": "new"}, older=["f1"]) as log:
        assert len(log.done) == 2 and log.header["fingerprint"] == "f1"
    with SampleLog(tmp_path, {"fingerprint": "new"}, older=["f0"]) as log:
        assert not log.done and log.header["fingerprint"] == "new"


def test_a_fingerprint_depends_on_every_part(monkeypatch):
    parts = {"config": {"seed": 0, "a": 1.0}, "model": "m"}
    same = {"model": "m", "config": {"a": 1.0, "seed": 0}}
    assert record.fingerprint(parts) == record.fingerprint(same)
    assert record.fingerprint(parts) != record.fingerprint({**parts, "model": "n"})
    before = record.fingerprint(parts)
    monkeypatch.setattr(record, "RESULT_VERSION", record.RESULT_VERSION + 1)
    assert record.fingerprint(parts) != before


def test_provenance_is_complete_and_plain(tmp_path):
    found = json.loads(record.canonical(record.provenance()))
    assert set(found) == {
        "git_commit",
        "git_dirty",
        "versions",
        "os",
        "cpu",
        "cores",
        "cuda_visible_devices",
        "slurm_job",
        "utc",
        "command",
    }
    assert found["versions"]["python"] == sys.version.split()[0]


def test_a_program_that_imports_ipykernel_is_no_notebook():
    importlib.import_module("ipykernel.kernelapp")
    assert record.provenance()["command"] != "a notebook"


def test_the_command_of_a_record_names_no_ones_folders(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/home/a/bench.py", "--out=/home/a/x.json", "--in", "/home/a/y", "--kvpress", "env/python"]
    )
    assert record.provenance()["command"] == "bench.py --out=x.json --in y --kvpress env/python"


HOLD = """
import sys
from pathlib import Path
from kvlib.record import SampleLog, locked
if sys.argv[2] == "log":
    hold = SampleLog(sys.argv[1], {"fingerprint": "f1"})
    print(list(hold.done), flush=True)
else:
    hold = locked(Path(sys.argv[1]) / "lock")
    hold.__enter__()
    print("held", flush=True)
sys.stdin.readline()
"""


def hold(folder, what):
    """A process that holds the lock, or the sample log, of folder until it is killed."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, what],
        env=os.environ | {"PYTHONPATH": str(Path(record.__file__).parent.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(process):
    process.kill()
    process.communicate()


def test_a_held_lock_is_refused_or_waited_for_naming_the_holder(tmp_path):
    holder = hold(tmp_path, "lock")
    holder.stdout.readline()
    refusal = pytest.raises(LockedError, match=rf"in use by process {holder.pid} on \S+ since \d")
    with refusal, record.locked(tmp_path / "lock", wait=False):
        pass
    waiter = hold(tmp_path, "lock")
    assert f"process {holder.pid}" in waiter.stdout.readline()
    end(holder)
    assert waiter.stdout.readline() == "held\n"
    end(waiter)


def test_a_second_writer_waits_and_then_sees_what_the_first_wrote(tmp_path):
    with SampleLog(tmp_path, HEADER) as log:
        second = hold(tmp_path, "log")
        assert f"process {os.getpid()}" in second.stdout.readline()
        log.append(sample(0))
    assert second.stdout.readline() == "['chain-a/0/0']\n"
    end(second)
