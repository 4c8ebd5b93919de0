"""Processes that end with the one that started them, what is shown while they work, and how a command ends."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from kvlib.config import RunConfig
from kvlib.cost import clock
from kvlib.errors import ConfigError, Spoken
from kvlib.record import LockedError

# A Python module that ends with the process of the given id, its parent, whatever ends that.
TIED = "import runpy, sys; from kvlib.study.processes import die_with_parent; die_with_parent(int(sys.argv[1])); "
TIED += "sys.argv[:] = sys.argv[2:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"


class StudyError(Spoken, RuntimeError):
    """A study that did not come to its end; the message says what failed and what to type next."""


class NotebookError(Spoken, RuntimeError):
    """A notebook that did not run to its end; `code` is the exit code that says why."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def die_with_parent(parent: int) -> None:
    """Exit within half a second once the process `parent`, which started this one, is gone, whatever killed it.

    Polls, as ipykernel does: the kernel's death signal follows the parent's thread, not its process. The parent is
    named by whoever knows it, because it may be gone before this is called.
    """

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def tied(module: str, *arguments, output, **environment: str):
    """A Python module as a process of its own session that ends when this block or this process does."""
    command = [sys.executable, "-c", TIED, str(os.getpid()), module, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        env={"USER": str(os.getuid()), **os.environ, **environment},  # a container's user may have no name
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def exit_code(command: Callable[[], int | None]) -> int:
    """Do what a command does; what a person can do something about becomes a sentence and an exit code."""
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except LockedError as error:
        return failed(75, f"{error}.\nWait for that study to end, or stop it, then run this again")
    except ConfigError as error:
        return failed(2, error)
    except Spoken as error:
        return failed(1, error)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return failed(130, "\ninterrupted; every finished sample is kept, the same command continues")


def failed(code: int, message) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


class Progress:
    """Counts finished cells and samples from the files, so it needs no word from who decodes them."""

    def __init__(self, cells: Mapping[Path, RunConfig], prints: Mapping[Path, Collection[str]]):
        self.prints = prints
        self.sizes = dict.fromkeys(cells, (0, 0))  # bytes read, lines seen
        per_cell = [config.n_problems and config.n_problems * config.n_samples for config in cells.values()]
        self.total = sum(per_cell) if all(per_cell) else None
        self.done_at_start = self.samples()
        self.start = time.monotonic()

    def samples(self) -> int:
        for folder, (size, lines) in self.sizes.items():
            with contextlib.suppress(OSError), open(folder / "samples.jsonl", "rb") as file:
                header = file.readline()
                if any(mark.encode() in header for mark in self.prints[folder]):
                    file.seek(size)
                    new = file.read()
                    self.sizes[folder] = (size + len(new), lines + new.count(b"\n"))
        return sum(max(0, lines - 1) for _, lines in self.sizes.values())  # less the header

    def line(self) -> str:
        done, elapsed = self.samples(), time.monotonic() - self.start
        of = f" of {self.total:,}" if self.total else ""
        n_cells = sum(is_published(folder, marks) for folder, marks in self.prints.items())
        text = f"cells {n_cells} of {len(self.prints)}, samples {done:,}{of}, {clock(elapsed)}"
        new = done - self.done_at_start
        if self.total and self.total / 50 <= new and done < self.total:  # the first samples are mostly start-up
            text += f", about {clock(elapsed * (self.total - done) / new)} left"
        return text


def is_published(folder: Path, marks: Collection[str]) -> bool:
    with contextlib.suppress(OSError):
        record = (folder / "record.json").read_text()
        return any(mark in record for mark in marks)
    return False


def watch(process: subprocess.Popen, line: Callable[[], str]) -> None:
    """Show a line of progress until the process ends: in place on a terminal, else every 15 s if it changed."""
    terminal, shown, ended = sys.stdout.isatty(), "", False
    while not ended:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1 if terminal else 15)
            ended = True
        now = line()
        if terminal:
            print(f"\r\033[2K{now}", end="\n" if ended else "", flush=True)
        elif now != shown:
            print(now, flush=True)
        shown = now
