"""What is damaged, wherever and by however little, is found, and what was there is kept."""

import json
import os
import shutil
import subprocess

import pytest
from test_record import BODY, HEADER, fill, sample

from kvlib import record
from kvlib.record import RecordError, SampleLog


def flips(whole: bytes):
    return (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole)))


def cuts(whole: bytes):
    return (whole[:at] for at in range(len(whole) - 1))  # less the last newline, nothing is lost


@pytest.mark.parametrize("damaged", [flips, cuts])
def test_a_record_edited_or_cut_at_any_byte_is_found_and_kept_aside(tmp_path, damaged):
    fill(tmp_path, range(2))
    record.publish(tmp_path, BODY)
    path = tmp_path / "record.json"
    whole = path.read_bytes()
    for content in damaged(whole):
        path.write_bytes(content)
        with pytest.raises(RecordError):
            record.read_record(tmp_path)
        assert not record.is_done(tmp_path, {"f1"})
    record.publish(tmp_path, BODY)
    assert path.read_bytes() == whole and (tmp_path / "record.1.json").read_bytes() == content


@pytest.mark.parametrize("damaged", [flips, cuts])
def test_a_samples_file_edited_or_cut_at_any_byte_never_yields_another_sample(tmp_path, damaged):
    path = fill(tmp_path, range(2))
    whole, good = path.read_bytes(), {"chain-a/0/0": sample(0), "chain-a/1/0": sample(1)}
    record.publish(tmp_path, BODY)
    last = whole[:-1].rindex(b"\n") + 1
    refused = 0
    for content in damaged(whole):
        path.write_bytes(content)
        assert not record.is_done(tmp_path, {"f1"})
        try:
            _, done, _ = record.load_samples(path)
        except RecordError:
            refused += 1
        else:
            assert done.items() <= good.items() and len(done) < 2, content
    # All but the newline before the last line: without it the two are one torn line, set aside.
    assert refused == (last - 1 if damaged is flips else 0)


def test_a_line_torn_at_any_byte_of_any_line_costs_no_line_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand would take half a minute on a busy disk
    path = fill(tmp_path, range(2))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        (tmp_path / "samples.torn").unlink(missing_ok=True)
        whole_lines = whole[:cut].count(b"\n")
        with SampleLog(tmp_path, HEADER) as log:
            assert len(log.done) == max(0, whole_lines - 1)
            kept_aside = tmp_path / "samples.torn"
            torn = whole[:cut].rpartition(b"\n")[2]
            assert (kept_aside.read_bytes() if kept_aside.exists() else b"") == (torn if whole_lines else b"")
            for number in range(len(log.done), 2):
                log.append(sample(number))
        assert path.read_bytes() == whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system; test_record has a faked full disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill_up(disk, leave: int = 0):
    """Take all but `leave` bytes of the disk's space."""
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave)))


def test_a_full_disk_leaves_the_old_record_and_every_whole_sample(small_disk):
    cell = small_disk / "cell"
    fill(cell, range(3))
    old = record.publish(cell, BODY)
    samples = (cell / "samples.jsonl").read_bytes()
    fill_up(small_disk)
    with pytest.raises(RecordError, match=r"disk is full: free some space, then run again; finished samples are kept"):
        record.publish(cell, {**BODY, "results": {"text": "x" * 9000}})
    with SampleLog(cell, HEADER) as log, pytest.raises(RecordError, match="disk is full"):
        for number in range(3, 99):
            log.append(sample(number, "x" * 500))
    on_disk = (cell / "samples.jsonl").read_bytes()
    assert on_disk.startswith(samples) and on_disk.endswith(b"\n")
    assert json.loads((cell / "record.json").read_text()) == old
    assert sorted(path.name for path in cell.iterdir()) == [".samples.lock", "record.json", "samples.jsonl"]
    (small_disk / "filler").unlink()
    record.publish(cell, {**BODY, "fingerprint": "f1"})
    assert record.is_done(cell, {"f1"})
