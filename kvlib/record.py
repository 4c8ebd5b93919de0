"""One cell's folder on disk: samples.jsonl while it runs, record.json when it is done.

A line is one finished sample, fsynced; a record is checksummed and published atomically, last. The record,
nothing else, says that a cell is done. Knows files; not models, policies or charts.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import zlib
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path

from kvlib.errors import Spoken
from kvlib.files import sync_folder, write_atomically

RESULT_VERSION = 1  # raise it when the code's results change for the same config
SAMPLES_SCHEMA = "kvlib.samples/1"
RECORD_SCHEMA = "kvlib.record/1"
AGAIN = "Run the study again: the cell is rebuilt from its samples"
SAMPLE_KEYS = {"id", "problem", "sample", "output", "answer", "correct", "n_prompt", "n_tokens", "stop"}


class RecordError(Spoken, RuntimeError):
    """A record or samples file that cannot be read, written or trusted; the message names the next step."""


class LockedError(Spoken, RuntimeError):
    """Someone else holds the lock; the message names them."""


class SampleLog:
    """The samples of one cell, appended line by line; use it in a `with` block.

    header: at least {"fingerprint": str}, normally also config and provenance at generation time. older: fingerprints
    of the same samples by an older kvlib. Opening waits until no other process writes here, moves samples of another
    fingerprint (and their record) aside, drops a torn last line, and loads what is there into `done`, {id: sample}.
    `header` is the file's own. Raises RecordError if a line is damaged or repeated, or the folder cannot be written.
    """

    def __init__(self, folder, header: dict, older: Collection[str] = ()):
        self.folder = Path(folder)
        self.path = self.folder / "samples.jsonl"
        self._file = None
        with explained(self.folder), contextlib.ExitStack() as opened:
            opened.enter_context(locked(self.folder / ".samples.lock"))
            found, self.done, end = load_samples(self.path)
            if found is None or found["fingerprint"] not in (header["fingerprint"], *older):
                rotate(self.folder)
                found, self.done, end = None, {}, 0
            self._file = opened.enter_context(open(self.path, "ab", buffering=0))
            set_torn_tail_aside(self.path, end)
            self.header = found or {"schema": SAMPLES_SCHEMA, **header}
            if found is None:
                self._write(self.header)
                sync_folder(self.folder)
            self._opened = opened.pop_all()

    def append(self, sample: dict) -> None:
        """Add one finished sample (SAMPLE_KEYS and more); it is on disk on return. Raises RecordError."""
        missing = sorted(SAMPLE_KEYS - set(sample))
        if missing or sample["id"] in self.done:
            wrong = f"lacks {', '.join(missing)}" if missing else f"{sample['id']} is there already"
            raise RecordError(f"{self.path} refused a sample: {wrong}")
        with explained(self.folder):
            self._write(sample)
        self.done[sample["id"]] = sample

    def _write(self, entry: dict) -> None:
        start = os.fstat(self._file.fileno()).st_size
        line = memoryview(encode_line(entry))
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError:
            # A later append must not continue half a line.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), start)
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._opened.close()


def encode_line(entry: dict) -> bytes:
    body = canonical(entry)
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def decode_line(line: bytes) -> dict:
    """The entry of one line; raises ValueError if it is not whole."""
    entry = json.loads(line)
    if not line.endswith(b"\n") or entry.pop("crc") != f"{zlib.crc32(canonical(entry)):08x}":
        raise ValueError("checksum")
    return entry


def load_samples(path) -> tuple[dict | None, dict, int]:
    """(header or None, {id: sample}, where the last whole line ends in bytes) of a samples file.

    A missing or empty file has no header. A torn last line is left out; any other damage is a RecordError.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    header, done, end = None, {}, 0
    for number, line in enumerate(lines, 1):
        try:
            entry = decode_line(line)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                break
            raise RecordError(f"{path}:{number} is damaged. Nothing was changed: restore the file from a "
                              "copy, or move it away to decode the cell again") from error  # fmt: skip
        end += len(line)
        if number == 1:
            if entry.get("schema") != SAMPLES_SCHEMA or "fingerprint" not in entry:
                raise RecordError(f"{path}:1 is not a {SAMPLES_SCHEMA} header; move the file away")
            header = entry
        elif entry["id"] in done:
            raise RecordError(f"{path}:{number} repeats the sample {entry['id']}; move the file away")
        else:
            done[entry["id"]] = entry
    return header, done, end


def set_torn_tail_aside(path: Path, end: int) -> None:
    with open(path, "r+b") as file:
        file.seek(end)
        torn = file.read()
        if torn:
            with open(path.with_name("samples.torn"), "ab") as aside:
                aside.write(torn)
            file.truncate(end)
            os.fsync(file.fileno())


def rotate(folder: Path, names: Iterable[str] = ("record.json", "samples.jsonl")) -> None:
    """Move these files to the next free record.N.json and samples.N.jsonl, the record first: it must not outlive
    its samples."""
    number = 1
    while any(folder.glob(f"*.{number}.json*")):
        number += 1
    for name in names:
        path = folder / name
        if path.exists():
            path.rename(path.with_suffix(f".{number}{path.suffix}"))
    sync_folder(folder)


def publish(folder, record: dict) -> dict:
    """Write folder/record.json atomically: the old or the new record is there at every moment.

    record: a dict of JSON values, with "fingerprint", "config" and "results". Adds schema, samples_sha256
    and sha256 and returns the whole. Raises RecordError if it is no JSON (NaN is none) or cannot be written.
    """
    folder = Path(folder)
    samples = folder / "samples.jsonl"
    try:
        body = json.loads(canonical(record))
    except (TypeError, ValueError) as error:
        raise RecordError(f"the record for {folder} is not plain JSON ({error})") from error
    with explained(folder):
        path = folder / "record.json"
        if path.exists():
            try:
                parse_record(path, path.read_bytes())
            except RecordError:
                rotate(folder, ["record.json"])  # damaged or edited: kept, but no longer in the way
        body["schema"] = RECORD_SCHEMA
        body["samples_sha256"] = sha256(samples.read_bytes()) if samples.exists() else None
        body["sha256"] = body_sha256(body)
        text = json.dumps(body, indent=1, sort_keys=True) + "\n"
        write_atomically(path, text.encode())
    return body


def read_record(folder) -> dict:
    """The record of a cell's folder, its checksums verified (the samples' too if they are there).

    Raises RecordError if there is none, or if it or its samples were damaged or edited.
    """
    path = Path(folder) / "record.json"
    with explained(Path(folder)):
        if not path.exists():
            raise RecordError(f"no record at {path}: the cell has not finished. Run the study (again)")
        content = path.read_bytes()
        samples = path.with_name("samples.jsonl")
        samples_sha256 = sha256(samples.read_bytes()) if samples.exists() else None
    record = parse_record(path, content)
    if samples_sha256 not in (None, record["samples_sha256"]):
        raise RecordError(f"{samples} is not the file that {path} was made from. {AGAIN}")
    return record


def parse_record(path: Path, content: bytes) -> dict:
    try:
        record = json.loads(content)
        schema, stored = record["schema"], record["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is damaged: not a record. {AGAIN}") from error
    if schema != RECORD_SCHEMA:
        raise RecordError(f"{path} has the schema {schema!r}, this kvlib reads {RECORD_SCHEMA}. {AGAIN}")
    if stored != body_sha256(record):
        raise RecordError(f"{path} was damaged or edited: its checksum does not match. {AGAIN}")
    return record


def is_done(folder, fingerprints: Collection[str]) -> bool:
    """Whether the folder holds a valid record of one of these fingerprints."""
    try:
        return read_record(folder).get("fingerprint") in fingerprints
    except RecordError:
        return False


def load_records(root, kind: str = "cell"):
    """A DataFrame with one row per finished cell below root, sorted by folder.

    Columns: folder, fingerprint, then whatever config, cost and results hold, the later winning; nested names
    are joined by a dot (policy_options.ratio). kind: the record's own "kind", "cell" where it has none.
    Raises RecordError if there is no such folder or any record is damaged: never a silent subset.
    """
    import pandas as pd

    if not Path(root).is_dir():
        raise RecordError(f"there is no folder {Path(root).absolute()}; check the path, or run the study first")
    rows = []
    for path in sorted(Path(root).rglob("record.json")):
        record = read_record(path.parent)
        if record.get("kind", "cell") == kind:
            own = {"folder": str(path.parent), "fingerprint": record.get("fingerprint")}
            rows.append({**own, **record.get("config", {}), **record.get("cost", {}), **record.get("results", {})})
    return pd.json_normalize(rows)


def fingerprint(parts: dict) -> str:
    """sha256 of everything a result depends on: parts (config, hashes of dataset, model, predictor as JSON values) and
    RESULT_VERSION."""
    return sha256(canonical({**parts, "result_version": RESULT_VERSION}))


def provenance() -> dict:
    """Where, when and with what: git, versions, machine, UTC time, command. Commit and dirty are None
    outside git; the command names no one's folders, and is KVLIB_COMMAND where a cell command started this kernel."""
    versions = {"python": platform.python_version()}
    for name in ("kvlib", "torch", "transformers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    # A kvlib inside someone else's repository, say in its .venv, is not described by that repository.
    tracked = git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    dirty = git("status", "--porcelain", "--untracked-files=no") if tracked else None
    typed = shlex.join([re.sub(r"(?<![^=])/.*/", "", word) for word in sys.argv])
    kernel = sys.modules.get("ipykernel.kernelapp")  # which a program may have imported without being a kernel
    interactive = "a notebook" if kernel and kernel.IPKernelApp.initialized() else typed
    return {
        "git_commit": git("rev-parse", "HEAD") if tracked else None,
        "git_dirty": None if dirty is None else dirty != "",
        "versions": versions,
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "utc": utc_now(),
        "command": os.environ.get("KVLIB_COMMAND", interactive),
    }


def git(*arguments: str) -> str | None:
    """What git says in kvlib's folder; None where it fails, hangs or is missing."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def locked(path: Path, wait: bool = True):
    """Make the folder of the lock file at path and hold the lock; the kernel frees it however this process ends.

    A lock held by another process is waited for after saying who holds it, or, without wait, raises
    LockedError at once. The same process may take it again, so a re-run notebook cell never waits for itself.
    Raises RecordError if the folder cannot be made, or has no locks.
    """
    with contextlib.ExitStack() as held:
        with explained(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(path, "a+"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                file.seek(0)
                holder = file.read().strip() or "another process"
                if not wait:
                    raise LockedError(f"{path.parent} is in use by {holder}") from error
                print(f"waiting: {path.parent} is in use by {holder}", flush=True)
                fcntl.lockf(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {utc_now()}\n")
            file.flush()
        yield


@contextlib.contextmanager
def explained(folder: Path):
    """Turn an OSError into a RecordError that says what, where and the next step."""
    try:
        yield
    except OSError as error:
        steps = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EROFS: "the folder is read-only: choose another",
            errno.EACCES: "permission denied: make the folder yours or choose another",
            errno.EPERM: "permission denied: make the folder yours or choose another",
            errno.ENOTDIR: "a file is where a folder must be: move it away",
            errno.EEXIST: "a file is where a folder must be: move it away",
            errno.ENOLCK: "this file system has no locks: choose a folder on another",
        }
        step = steps.get(error.errno, f"{error.strerror or error}")
        raise RecordError(f"cannot use {folder}: {step}, then run again; finished samples are kept") from error


def body_sha256(record: dict) -> str:
    return sha256(canonical({name: value for name, value in record.items() if name != "sha256"}))


def canonical(value) -> bytes:
    """The one JSON text of a value; raises ValueError on NaN, TypeError on what JSON lacks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
