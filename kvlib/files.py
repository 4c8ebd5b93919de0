"""Writing files that are whole or not there at all, and hashing them."""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from kvlib.errors import ConfigError

MANIFEST = "manifest.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Make the file's folder, and replace the file whole or not at all, synced to disk. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def file_state(path: Path) -> tuple:
    """Tells a file from the same file changed, without reading it: keys what is kept of it in memory."""
    found = path.stat()
    return path.absolute(), found.st_ino, found.st_size, found.st_mtime_ns


def file_sha256(path: Path) -> str:
    """Of an unchanged file reckoned only once: a study asks for the same 15 GB for every cell."""
    return _sha256(file_state(path))


@functools.cache
def _sha256(state: tuple) -> str:
    with state[0].open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_file(folder: Path, name: str) -> Path:
    """A shipped file that exists and has the hash its manifest states; ConfigError otherwise."""
    repair = "restore it with `git checkout -- kvlib/tiny/weights`, or install kvlib again"
    for path in (folder / MANIFEST, folder / name):
        if not path.exists():
            raise ConfigError(f"{path} is missing; {repair}")
    if file_sha256(folder / name) != json.loads((folder / MANIFEST).read_text()).get(name):
        raise ConfigError(f"{folder / name} is damaged (its sha256 is not the one in {MANIFEST}); {repair}")
    return folder / name


def update_manifest(folder: Path, files: Iterable[str]) -> None:
    """Write the sha256 of the named files of a weights folder into its manifest."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else {}
    manifest.update({name: file_sha256(folder / name) for name in files})
    write_atomically(path, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make renames and new files of the folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
