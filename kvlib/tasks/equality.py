"""Whether two answers are equal: numbers are compared here, the rest by math-verify in a process that may be killed."""

import json
import math
import re
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

from kvlib.errors import ConfigError
from kvlib.tasks.answers import LONGEST

CPU_SECONDS = 10  # per answer, as in the source
WALL_SECONDS = 600  # per answer, should the process wait for something instead of computing
PLAIN_NUMBER = re.compile(r"[+-]?\d{1,40}(?:\.\d{1,40})?", re.ASCII)
SPELLINGS = str.maketrans("−–＋－．，∕／（）％０１２３４５６７８９", "--+-.,//()%0123456789")
TOLERANCE = 1e-4  # relative, of the published grader


class Comparer:
    """Compares answers with the help of one process, started at the first need and again after it was killed.

    It works in threads, in notebooks and in scripts without a main guard: the process is a program of its own.
    """

    def __init__(self, cpu_seconds: int = CPU_SECONDS, wall_seconds: float = WALL_SECONDS):
        self.cpu_seconds, self.wall_seconds = cpu_seconds, wall_seconds
        self.process = None
        self.lock = threading.Lock()

    def strictly(self, gold: str, answer: str) -> bool | None:
        """Whether an answer equals the right one as a number, expression, tuple or set; None if its time ran out."""
        gold, answer = spelled(gold), spelled(answer)
        if answer == gold:
            return True
        # Nearly every answer: exact, and without waking the process.
        if PLAIN_NUMBER.fullmatch(gold) and PLAIN_NUMBER.fullmatch(answer):
            return Fraction(gold) == Fraction(answer)
        return self._ask("strict", gold, answer)

    def as_published(self, gold: str, answer: str) -> bool | None:
        """The same by the published rules: within 1e-4, and a hundred times or a hundredth of it is right too.

        Both in the spelling of `kvlib.tasks.answers.tidy`.
        """
        if answer.lower() == gold.lower():
            return True
        if (right := as_float(gold)) is not None and (given := as_float(answer)) is not None:
            return any(math.isclose(right * by, given, rel_tol=TOLERANCE) for by in (0.01, 1, 100))
        if unbracketed(answer, gold) == unbracketed(gold, answer):
            return True
        parts = [side[1:-1].split(",") for side in (gold, answer) if re.fullmatch(r"[(\[].+[)\]]", side)]
        if len(parts) == 2 and 1 < len(parts[0]) == len(parts[1]):
            pairs = zip(*parts, strict=True)
            if all(self.as_published(*pair) for pair in pairs):
                return True
        return self._ask("published", gold, answer)

    def close(self) -> None:
        with self.lock:
            self._stop()

    def _ask(self, rules: str, gold: str, answer: str) -> bool | None:
        if not answer.strip() or len(answer) >= LONGEST:
            return False
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            watch = threading.Timer(self.wall_seconds, self.process.kill)
            watch.start()
            try:
                self.process.stdin.write(json.dumps([rules, gold, answer, self.cpu_seconds]) + "\n")
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            except BaseException:  # an interrupted question's reply must not answer the next one
                self._stop()
                raise
            finally:
                watch.cancel()
            if not reply:
                self._stop()
            return json.loads(reply) if reply else None

    def _start(self) -> None:
        self._stop()
        # -P keeps this folder, whose modules are called as some of Python's are, off the path.
        self.process = subprocess.Popen(
            [sys.executable, "-P", Path(__file__).with_name("mathverify.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        if self.process.stdout.readline() != "ready\n":
            said = self.process.stderr.read().strip().splitlines()
            self._stop()
            raise ConfigError(f"math-verify does not start ({said[-1] if said else 'killed'}); "
                              "pip install 'math-verify>=0.9,<0.10', then run again")  # fmt: skip

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def spelled(text: str) -> str:
    """Less what stands around and between digits without a meaning, and in ASCII where there is such a sign."""
    text = text.translate(SPELLINGS).replace("°", "").removesuffix("\\\\").strip().removesuffix(".")
    text = re.sub(r"(?<=\d)(?:\\[,;!: ]|\{,\}|\s)(?=\d{3}(?!\d))", "", text)
    return re.sub(r"^([+-])\s+(?=\d)", r"\1", text)


def as_float(text: str) -> float | None:
    """A number less its thousands separators, a percentage as its hundredth; None if it is none."""
    text = text.replace(",", "")
    hundredth = text.endswith("%")
    try:
        return float(text.removesuffix("%").removesuffix("\\")) / (100 if hundredth else 1)
    except ValueError:
        return None


def unbracketed(text: str, other: str) -> str:
    """A text without round and curly brackets, and without square ones unless the other side has the other kind."""
    for opening, closing, unlike in (("[", "]", "("), ("(", ")", "[")):
        if text.startswith(opening) and text.endswith(closing) and not other.startswith(unlike):
            text = text.strip("[]()")
    return re.sub(r"[(){}]", "", text).lower()
