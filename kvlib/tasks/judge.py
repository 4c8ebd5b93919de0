"""The process that kvlib.tasks.equality asks: math-verify, or the scorer of a generator of reasoning-gym, locked in and
cut off. JSON in, JSON out, one line each.

Started as a script of its own, so it imports nothing of kvlib. An answer that costs more than its seconds of CPU (a
tower of powers, say) ends the process, by the kernel's own limit: no load on the machine turns a right answer into a
wrong one, and nothing is left running. Nothing in an answer is executed by math-verify, which parses LaTeX with a
grammar and hands Python's parser only digits and operators; some scorers do execute what they are given. So, once its
libraries and problems are loaded, the process can open no file, start no program and use no network.
"""

import contextlib
import dataclasses
import difflib
import json
import logging
import math
import os
import random
import resource
import sys
import time

import antlr4
import numpy
import sympy
from latex2sympy2_extended import latex2sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational
from sympy.parsing.latex._antlr.latexlexer import LaTeXLexer
from sympy.parsing.latex._antlr.latexparser import LaTeXParser
from sympy.parsing.latex._parse_latex_antlr import MathErrorListener, convert_relation

MEMORY_BYTES = 4 << 30
TOLERANCE = 1e-4  # relative, of the published grader
DIGITS = 1000  # after the point, to which expressions, tuples and sets are compared: more than an answer can hold
PERCENT = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
INSTALL = "pip install 'kvlib[gym]', then pip install --no-deps reasoning-gym (it pins another version of tabulate)"
REFUSED = ("open", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "tempfile.", "webbrowser.")


def strictly(gold: str, answer: str) -> bool:
    """Numbers are equal exactly; of the rest math-verify says so, its decimals read as fractions."""
    as_latex = [LatexExtractionConfig()]
    read = [parse(f"\\boxed{{{text}}}", as_latex, parsing_timeout=None) for text in (gold, answer)]
    sides = [[exact(part) for part in side] for side in read]
    if all(side and isinstance(side[0], sympy.Expr) and side[0].is_number for side in sides):
        return same_number(sides[0][0], sides[1][0])
    return verify(*sides, numeric_precision=DIGITS, allow_set_relation_comp=True, timeout_seconds=None)


def exact(part):
    """What math-verify read, each decimal as the fraction that it stands for, alternatives as the set they fill."""
    if isinstance(part, sympy.FiniteSet) and all(isinstance(one, Relational) for one in part.args):
        part = sympy.Or(*part.args).as_set()
    if isinstance(part, sympy.Float):
        return sympy.Rational(str(part))
    if isinstance(part, sympy.MatrixBase):
        return part.applyfunc(exact)
    if not isinstance(part, sympy.Basic) or not part.has(sympy.Float):
        return part
    return part.func(*map(exact, getattr(part, "_unsorted_args", part.args)))  # the order that was written, of a set


def same_number(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Whether two numbers are one; a percentage may stand for its hundredth or, to a plain number, for itself."""
    percent = [number.has(PERCENT) for number in (gold, answer)]
    if percent[0] != percent[1]:
        plain = [number.xreplace({PERCENT: sympy.Integer(1)}) for number in (gold, answer)]
        if same_number(*plain):
            return True
    gold, answer = gold.doit(), answer.doit()
    difference = gold - answer
    if difference.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo) or difference.is_Rational:
        return gold == answer and not gold.has(sympy.nan, sympy.zoo)
    # Far apart is decided in digits; what agrees in fifty of them is proved equal, or it is not.
    if abs(sympy.N(difference, 30)) > sympy.N(abs(gold) + abs(answer), 30) * sympy.Rational(1, 10**50):
        return False
    return difference.equals(0) is True or sympy.simplify(difference).is_zero is True


def as_published(gold: str, answer: str) -> bool:
    """The published grader's last resort: both sides as sympy reads LaTeX, equal in form, in value or within 1e-4."""
    right, given = readable(gold), readable(answer)
    if not isinstance(right, sympy.Basic) or not isinstance(given, sympy.Basic):
        return str(right) == str(given)  # never more: sympy would execute what it is given as text
    return any(
        holds(check)
        for check in (
            lambda: right == given or str(right) == str(given),
            lambda: right.equals(given) or sympy.simplify(right - given) == 0,
            lambda: abs(right.lhs - right.rhs).equals(abs(given.lhs - given.rhs)),
            lambda: math.isclose(float(sympy.N(right)), float(sympy.N(given)), rel_tol=TOLERANCE),
        )
    )


def readable(text: str):
    """An expression, read as the source reads it, less its parse_expr, which would execute the text; else the text."""
    for read in (by_sympy, latex2sympy):
        for spelling in (text.replace("\\\\", "\\"), text):
            with contextlib.suppress(Exception):
                return read(spelling)
    return text


def by_sympy(text: str):
    """What sympy.parsing.latex.parse_latex does; that itself insists on antlr 4.11, and math-verify works with 4.13."""
    errors = MathErrorListener(text)
    lexer = LaTeXLexer(antlr4.InputStream(text.strip()))
    parser = LaTeXParser(antlr4.CommonTokenStream(lexer))
    for reader in (lexer, parser):
        reader.removeErrorListeners()
        reader.addErrorListener(errors)
    return convert_relation(parser.math().relation())


def holds(check) -> bool:
    """Whether a comparison says so. sympy raises dozens of kinds; an answer that breaks it is not thereby right."""
    try:
        return bool(check())
    except Exception:
        return False


def guard(event: str, arguments: tuple) -> None:
    """An audit hook that lets modules be imported and refuses to open files, programs and connections."""
    is_import = event == "open" and str(arguments[0]).endswith((".py", ".pyc", ".so")) and arguments[1] in ("r", "rb")
    if event.startswith(REFUSED) and event != "os.listdir" and not is_import:
        raise PermissionError(f"{event} is refused while answers are compared")


def limit(kind: int, most: int) -> None:
    """Lower a limit of this process, where the system knows it (macOS has none for the address space)."""
    _, hard = resource.getrlimit(kind)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def generated(name: str, settings: dict) -> tuple[dict, list]:
    """The problems of a generator, or the fault of its name or settings, a clause; and a scorer for each problem."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        return {"fault": f"it needs the package reasoning-gym ({error}); {INSTALL}"}, []
    if name not in DATASETS:
        return {"fault": f"reasoning-gym has no generator {name!r}; {hint(name, sorted(DATASETS))}"}, []
    kind, config = DATASETS[name]
    known = [field.name for field in dataclasses.fields(config)]
    strange = next((setting for setting in settings if setting not in known), None)
    if strange is not None:
        return {"fault": f"the generator {name} has no setting {strange!r}; {hint(strange, known)}"}, []
    try:
        made = config(**settings)
        made.validate()
        random.seed(0)  # not every generator draws from its own seed alone
        numpy.random.seed(0)
        source = kind(config=made)
        entries = [source[i] for i in range(len(source))]
    except Exception as error:
        said = " ".join((str(error) or type(error).__name__).split())[:300]
        return {"fault": f"reasoning-gym refuses it ({said}); correct the settings"}, []
    problems = [[entry["question"], entry["answer"]] for entry in entries]
    settings = {name: repr(getattr(made, name)) for name in known}
    return {"problems": problems, "settings": settings}, [(source, entry) for entry in entries]


def hint(wrong: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wrong, known, 3)
    return f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"


def serve(*generator: str) -> None:
    """Answer [rules, gold, answer, seconds] with a verdict; under the rules "scorer", gold is a problem's number.

    generator: the name and, as JSON, the settings of one of reasoning-gym, whose problems are the first reply.
    """
    sys.dont_write_bytecode = True
    logging.disable(logging.CRITICAL)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    for number in (1, 2):  # what a library prints would mix with the replies
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    opening, scored = generated(generator[0], json.loads(generator[1])) if generator else ("ready", [])
    compare = {
        "strict": strictly,
        "published": as_published,
        "scorer": lambda i, answer: scored[i][0].score_answer(answer, scored[i][1]) >= 1,
    }
    for rules in ("scorer",) if generator else ("strict", "published"):  # loads what is loaded late
        holds(lambda: compare[rules](0 if generator else "\\frac{1}{2}", "x^2+1"))  # noqa: B023 - called at once
    sys.addaudithook(guard)
    print(json.dumps(opening), file=replies)
    for line in sys.stdin:
        rules, gold, answer, seconds = json.loads(line)
        limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)
        print(json.dumps(holds(lambda: compare[rules](gold, answer))), file=replies)  # noqa: B023 - called at once


if __name__ == "__main__":
    serve(*sys.argv[1:])
