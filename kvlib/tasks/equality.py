"""Whether an answer is right: numbers are compared here, the rest is judged in a process that may be killed."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import unicodedata
from fractions import Fraction
from pathlib import Path

from kvlib.errors import ConfigError
from kvlib.tasks.answers import LONGEST

CPU_SECONDS = 10  # per answer, as in the source
WALL_SECONDS = 600  # per answer, should the process wait for something instead of computing
PLAIN_NUMBER = re.compile(r"[+-]?(?:\d{1,300}(?:\.\d{0,300})?|\.\d{1,300})", re.ASCII)
BASED = re.compile(r"(\d[\dA-Z]*)(?:_\{?(\d+)\}?)?", re.ASCII)
SPELLINGS = str.maketrans("−–＋－．，∕／⁄（）％０１２３４５６７８９", "--+-.,///()%0123456789") | str.maketrans(
    {"°": "", "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "±": r"\pm ",
     "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "}
)  # fmt: skip
TEXT = re.compile(r"\\(?:text|math)(?:rm|bf|it|tt)?\{([^{}]*)\}")
NUMBER_AS_TEXT = re.compile(TEXT.pattern.replace("[^{}]*", r"[^{}\\A-Za-z]*"))
RAISED = re.compile("([¼-¾⅐-⅞])|([⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ]+)|[₀-₉₊₋₍₎]+")
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
ROOT = re.compile(r"([√∛∜])\s*(?:\{([^{}]*)\}|(\d+(?:\.\d+)?|\([^()]*\)|\\?[a-zA-Z]+))")
RECURRING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d+)\))", re.ASCII)
MIXED = re.compile(
    r"(?<![\d./}_^])(\d+)(?:(?:\s|\\[ ,])+(\d+)\s*/\s*(\d+)(?![\d./])"  # 1 1/4
    r"|(?:\s|\\[ ,!])*\\[dt]?frac\s*(?:\{(\d+)\}\{(\d+)\}|(\d)(\d)))", re.ASCII)  # fmt: skip
INFINITY = re.compile(r"\\text\{inf(?:inity)?\}|(?<![A-Za-z\\])inf(?:inity)?(?![A-Za-z])", re.IGNORECASE)
TOLERANCE = 1e-4  # relative, of the published grader


class Comparer:
    """Compares answers with the help of one process, started at the first need and again after it was killed.

    It works in threads, in notebooks and in scripts without a main guard: the process is a program of its own.
    generator: the name and, as JSON, the settings of a generator of reasoning-gym whose scorer is to be asked.
    """

    def __init__(self, cpu_seconds: int = CPU_SECONDS, generator: tuple = ()):
        self.cpu_seconds, self.generator = cpu_seconds, generator
        self.process = None
        self.lock = threading.Lock()

    def strictly(self, gold: str, answer: str) -> bool | None:
        """Whether an answer equals the right one as a number, expression, tuple or set; None if its time ran out."""
        gold, answer = spelled(gold), spelled(answer)
        if untexted(answer) == untexted(gold):
            return True
        # Nearly every answer: exact, and without waking the process.
        if PLAIN_NUMBER.fullmatch(gold) and PLAIN_NUMBER.fullmatch(answer):
            return Fraction(gold) == Fraction(answer)
        right, given = BASED.fullmatch(gold), BASED.fullmatch(answer)
        if right and given and (right[2] or given[2]):  # a base that one of them leaves out is the question's
            return right[1] == given[1] and (right[2] or given[2]) == (given[2] or right[2])
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

    def scored(self, i: int, answer: str) -> bool | None:
        """Whether the generator's scorer gives full marks to an answer to its problem i; None if its time ran out."""
        return self._ask("scorer", i, answer)

    def opening(self):
        """What the process says first: "ready", or a generator's problems or faults."""
        with self.lock:
            return self._start()

    def close(self) -> None:
        with self.lock:
            self._stop()

    def _ask(self, rules: str, gold: str | int, answer: str) -> bool | None:
        if not answer.strip() or (len(answer) >= LONGEST and rules != "scorer"):
            return False
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            watch = threading.Timer(WALL_SECONDS, self.process.kill)
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

    def _start(self):
        self._stop()
        # -P keeps this folder, whose modules are called as some of Python's are, off the path; some generators draw
        # from sets, whose order hangs on the hash seed.
        self.process = subprocess.Popen(
            [sys.executable, "-P", Path(__file__).with_name("judge.py"), *self.generator],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines()
            self._stop()
            what = " of ".join([*self.generator[:1], "reasoning-gym" if self.generator else "math-verify"])
            raise ConfigError(f"{what} does not start ({said[-1] if said else 'killed'}); "
                              "pip install 'math-verify>=0.9,<0.10', then run again")  # fmt: skip
        return json.loads(line)

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def untexted(text: str) -> str:
    """Words as they are, less LaTeX's \\text{} around them."""
    return TEXT.sub(r"\1", text)


def spelled(text: str) -> str:
    """An answer in the LaTeX that math-verify reads, less what stands around and between digits without a meaning."""
    text = RAISED.sub(_lowered, NUMBER_AS_TEXT.sub(r"\1", text))
    text = text.translate(SPELLINGS).removesuffix("\\\\").strip()
    text = re.sub(r"(?<!\\)[.,;]+$", "", text)
    text = ROOT.sub(lambda root: f"{ROOTS[root[1]]}{{{root[2] or root[3]}}}", text)
    text = RECURRING.sub(_recurring, text)
    text = re.sub(r"(?<![\w.}])(\d+\.\d*|\.\d+)[eE]([+-]?\d{1,3})(?![\w.])", r"\1\\cdot10^{\2}", text)
    text = MIXED.sub(_mixed, text)
    text = INFINITY.sub(r"\\infty", text)
    text = re.sub(r"(?<=\d)(?:\\[,;!: ]|\{,\}|\s)(?=\d{3}(?!\d))", "", text)
    return re.sub(r"^([+-])\s+(?=\d)", r"\1", text)


def _lowered(signs: re.Match) -> str:
    """½ as \\frac{1}{2}, x² as x^{2}, x₁ as x_{1}."""
    plain = unicodedata.normalize("NFKC", signs[0])
    return rf"\frac{{{plain}}}".replace("⁄", "}{") if signs[1] else f"^{{{plain}}}" if signs[2] else f"_{{{plain}}}"


def _recurring(number: re.Match) -> str:
    """0.1\\overline{6} as 1/6."""
    whole, fixed, again = number[1] or "0", number[2], number[3] or number[4] or number[5]
    value = Fraction(int(whole + fixed + again) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(again) - 1))
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _mixed(number: re.Match) -> str:
    """1 1/4 as 5/4; what is left of an improper fraction is no mixed number."""
    whole, above, below = (int(digits) for digits in number.groups() if digits)
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if above < below else number[0]


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
