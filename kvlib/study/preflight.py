"""What stands in the way of a study, found in seconds and said all at once, before minutes are spent."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

from kvlib.errors import ConfigError
from kvlib.record import RecordError, locked
from kvlib.study.gpus import GPU


def find_faults(checks: Iterable[Callable[[], None]]) -> list[str]:
    """What the checks complain of (ConfigError, RecordError), line by line, each line once."""
    faults = []
    for check in checks:
        try:
            check()
        except (ConfigError, RecordError) as error:
            faults += str(error).splitlines()
    return list(dict.fromkeys(faults))


def check_disk(folder: Path, need_gb: float) -> None:
    """Raise ConfigError if the disk that holds folder has less than need_gb free."""
    folder = existing(folder)
    free = shutil.disk_usage(folder).free / 1e9
    if free < need_gb:
        raise ConfigError(
            f"the disk of {folder} has {free:.1f} GB free and about {need_gb:.1f} GB are needed: free some, or have "
            "this folder on a larger disk (a link is fine)"
        )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


def check_gpus(n_needed: int, need_gb: float | None, gpus: list[GPU] | None) -> None:
    """Raise ConfigError unless n_needed GPUs have need_gb free each. None for what is not known: not checked."""
    if gpus is None:
        return
    if not gpus:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ConfigError(
            "nvidia-smi lists no GPU: run this where there is one"
            if named is None
            else f"CUDA_VISIBLE_DEVICES={named!r} hides all GPUs: unset it, or name GPUs in it"
        )
    if len(gpus) < n_needed:
        raise ConfigError(f"{n_needed} GPUs are asked for and {len(gpus)} can be seen: use GPUS={len(gpus)}")
    if need_gb is None:
        return
    small = [gpu for gpu in gpus if gpu.free_gb < need_gb]
    if len(gpus) - len(small) < n_needed:
        found = ", ".join(f"{gpu.index} ({gpu.name}) {gpu.free_gb:.1f} of {gpu.total_gb:.1f} GB" for gpu in small)
        raise ConfigError(
            f"a cell needs about {need_gb:.1f} GB of GPU memory, and free are on GPU {found}: stop what else runs "
            "there, name other GPUs in CUDA_VISIBLE_DEVICES, or lower batch_size or the largest KV budget"
        )


def check_toolchain(python_h: Path | None = None, ldconfig: Path = Path("/sbin/ldconfig")) -> None:
    """Raise ConfigError, a line each, for what Triton's first launch needs and this machine lacks.

    It builds a launcher: with a C compiler, Python's header and the linker's word on where libcuda is.
    """
    faults = []
    compiler = os.environ.get("CC", "gcc" if shutil.which("gcc") else "clang")
    if not shutil.which(compiler):
        named = f"CC names {compiler}, which is not there" if "CC" in os.environ else "there is neither gcc nor clang"
        faults.append(
            f"Triton needs a C compiler to launch kernels on a GPU, and {named}: install gcc (Debian, Ubuntu: apt "
            "install gcc; conda: conda install gcc), or name a compiler in CC"
        )
    python_h = python_h or Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not python_h.is_file():
        faults.append(
            f"Triton needs Python's header to launch kernels on a GPU, and there is no {python_h}: install it (Debian, "
            "Ubuntu: apt install python3-dev), or use conda's Python, which has it (conda env create -f env.yml)"
        )
    if not ldconfig.exists() and not os.environ.get("TRITON_LIBCUDA_PATH"):
        faults.append(
            f"Triton asks {ldconfig} where libcuda is, and it is not there: install it (Debian, Ubuntu: apt install "
            "libc-bin), or name the folder of libcuda.so.1 in TRITON_LIBCUDA_PATH"
        )
    if faults:
        raise ConfigError("\n".join(faults))


def other_process_gets(path: Path) -> bool:
    """Whether another process gets the lock at path, which this one holds."""
    rival = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return not subprocess.run([sys.executable, "-c", rival, str(path)], capture_output=True, timeout=60).returncode


def check_locks(folder: Path) -> None:
    """Raise ConfigError if two processes can hold one lock in folder, RecordError if the folder has no locks.

    Of a folder that is not there yet, the nearest one above it is tried, and nothing made.
    """
    folder = existing(folder)
    path = folder / ".lock-check"
    with locked(path, wait=False):
        both = other_process_gets(path)
    path.unlink(missing_ok=True)
    if both:
        raise ConfigError(
            f"file locks do not hold in {folder}: two processes got the same one, so two runs could write one cell. "
            "Have the folder on a local disk, or mount it with locks (Lustre: -o flock; NFS: without nolock)"
        )
