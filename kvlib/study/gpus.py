"""One GPU per cell on a machine with several: a lock file per device, freed by the kernel however its holders end.

Snakemake counts GPUs but never says which one a job has.
"""

import contextlib
import csv
import fcntl
import itertools
import math
import os
import random
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvlib.errors import ConfigError


@dataclass(frozen=True)
class GPU:
    """As nvidia-smi sees it; memory in GB, infinite if not known. One that it does not list (a MIG slice) has the name
    that CUDA_VISIBLE_DEVICES gives it as index and uuid."""

    index: str
    uuid: str
    name: str = "not in nvidia-smi's list"
    total_gb: float = math.inf
    free_gb: float = math.inf


@contextlib.contextmanager
def leased_gpu(folder: Path | None = None) -> Iterator[tuple[dict[str, str], tuple[int, ...]]]:
    """Hold one of the visible GPUs that no other process of this user holds; waits for one.

    Yields (environment, descriptors): what sets CUDA_VISIBLE_DEVICES to that GPU alone, and the open files which a
    child must inherit if the GPU is to stay leased until the child has ended too. Both are empty if there is nothing
    to choose: no GPU, or CUDA_VISIBLE_DEVICES (the user's, or Slurm's) names one already. folder: of the lock files,
    default one per user and machine. Raises ConfigError if that folder belongs to somebody else.
    """
    gpus = [gpu.uuid for gpu in visible_gpus() or ()]
    if not gpus or (len(gpus) == 1 and "CUDA_VISIBLE_DEVICES" in os.environ):
        yield {}, ()
        return
    folder = private_folder(folder or Path("/tmp") / f"kvlib-gpus-{os.getuid()}")
    with first_free(folder, gpus) as (gpu, descriptor):
        yield {"CUDA_VISIBLE_DEVICES": gpu}, (descriptor,)


@contextlib.contextmanager
def first_free(folder: Path, gpus: list[str]) -> Iterator[tuple[str, int]]:
    for attempt in itertools.count():
        for gpu in random.sample(gpus, len(gpus)):
            with open(folder / gpu.replace("/", "-"), "a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike lockf, shared with a child that inherits
                except BlockingIOError:
                    continue
                yield gpu, file.fileno()
                return
        if attempt == 0:
            print(f"waiting for one of {len(gpus)} GPUs", flush=True)
        time.sleep(0.5)


def visible_gpus() -> list[GPU] | None:
    """What CUDA_VISIBLE_DEVICES names, or else all GPUs; None if it is not set and nvidia-smi missing or silent."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    table = nvidia_smi("index", "uuid", "name", "memory.total", "memory.free")
    known = [GPU(*names, gigabytes(total), gigabytes(free)) for *names, total, free in table or ()]
    if named is None:
        return None if table is None else known
    names = itertools.takewhile(lambda name: name not in ("", "-1"), (name.strip() for name in named.split(",")))
    return list(dict.fromkeys(gpu_of(name, known) for name in names))


def gigabytes(mib: str) -> float:
    return int(mib) * 2**20 / 1e9 if mib.isdecimal() else math.inf


def gpu_of(name: str, known: list[GPU]) -> GPU:
    """The GPU of an index, or of the start of a UUID, that CUDA_VISIBLE_DEVICES holds."""
    if name.isdecimal() and int(name) < len(known):
        return known[int(name)]
    matches = [gpu for gpu in known if gpu.uuid.startswith(name)]
    return matches[0] if len(matches) == 1 else GPU(name, name)


def nvidia_smi(*fields: str) -> list[list[str]] | None:
    """What nvidia-smi says of every GPU, field by field, without units; None where it is missing or silent."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if row]
    return None


def private_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to somebody else and cannot hold this user's GPU locks; remove it, or "
                          "choose a GPU with CUDA_VISIBLE_DEVICES=0")  # fmt: skip
    return folder
