"""Chooses or makes the Python environment that make uses. Standard library only; run as `python -I`."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
READY = VENV / "ready"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def active() -> bool:
    """Whether this folder's kvlib is installed in the Python running this, unless that is our own .venv."""
    spec = importlib.util.find_spec("kvlib")
    here = spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent.parent == ROOT
    return here and Path(sys.prefix).resolve() != VENV.resolve()


def wanted() -> list[str]:
    """What a ready .venv was made from; a change in the first means a new .venv, in the second only kvlib."""
    lock = (ROOT / "requirements.lock").read_bytes()
    project = (ROOT / "pyproject.toml").read_bytes()
    return [hashlib.sha256(part).hexdigest() for part in (lock + os.fsencode(ROOT), project)]


def has_nvidia_gpu() -> bool:
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU" in found.stdout


def set_up() -> None:
    with open(ROOT / ".venv.lock", "w") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up in this folder to finish.", flush=True)
            fcntl.flock(guard, fcntl.LOCK_EX)

        def run(*command: object, **options: object) -> None:
            # Children hold the lock too, so an orphaned pip keeps a second set-up waiting.
            subprocess.run([str(part) for part in command], check=True, pass_fds=[guard.fileno()], **options)

        def pip_install(*arguments: object, **options: object) -> None:
            pip = [PYTHON, "-I", "-m", "pip", "--disable-pip-version-check"]
            run(*pip, "install", *arguments, cwd=ROOT, **options)

        target = wanted()
        have = READY.read_text().split() if READY.exists() and PYTHON.exists() else []
        if have == target:
            return
        READY.unlink(missing_ok=True)
        if have[:1] != target[:1]:
            print("Setting up .venv: a few minutes, 2.5 GB on disk (6 GB with CUDA).", flush=True)
            # The real binary, since this may be the .venv about to be replaced.
            run(os.path.realpath(sys.executable), "-I", "-m", "venv", "--clear", VENV)
            if sys.platform == "linux" and not has_nvidia_gpu():
                lock = (ROOT / "requirements.lock").read_text().splitlines()
                torch = next(line for line in lock if line.startswith("torch=="))
                quick = ["--timeout", "10", "--retries", "0", "--no-deps"]
                try:
                    pip_install(*quick, "--index-url", CPU_WHEELS, torch, stderr=subprocess.DEVNULL)
                except subprocess.CalledProcessError:
                    print("No CPU wheel of torch could be had; taking the default build.", flush=True)
            pip_install("-r", "requirements.lock")
        pip_install("--no-deps", "--no-build-isolation", "-e", ".")
        READY.write_text("\n".join(target))


def main() -> None:
    if sys.argv[1:] == ["--active"]:
        if not active():
            sys.exit(1)
        print(sys.executable)
        return
    try:
        set_up()
    except subprocess.CalledProcessError as error:
        sys.exit(f"Setting up {VENV} failed in: {' '.join(error.cmd)}\nSee above, then run make again.")
    except OSError as error:
        sys.exit(f"Setting up {VENV} failed: {error}. Is the folder writable, is there space?")
    except KeyboardInterrupt:
        sys.exit("Interrupted; run make again to set up afresh.")


if __name__ == "__main__":
    main()
