"""The process that kvlib.tasks.equality asks: math-verify, locked in and cut off. JSON in, JSON out, one line each.

Started as a script of its own, so it imports nothing of kvlib. An answer that costs more than its seconds of CPU (a
tower of powers, say) ends the process, by the kernel's own limit: no load on the machine turns a right answer into a
wrong one, and nothing is left running. Nothing in an answer is executed: math-verify parses LaTeX with a grammar and
hands Python's parser only digits and operators; besides, once math-verify is loaded the process can open no file,
start no program and use no network.
"""

import contextlib
import json
import logging
import math
import os
import resource
import sys
import time

import antlr4
import sympy
from latex2sympy2_extended import latex2sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.parsing.latex._antlr.latexlexer import LaTeXLexer
from sympy.parsing.latex._antlr.latexparser import LaTeXParser
from sympy.parsing.latex._parse_latex_antlr import MathErrorListener, convert_relation

MEMORY_BYTES = 4 << 30
TOLERANCE = 1e-4  # relative, of the published grader
REFUSED = ("open", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "tempfile.", "webbrowser.")


def strictly(gold: str, answer: str) -> bool:
    """math-verify's verdict."""
    as_latex = [LatexExtractionConfig()]
    sides = [parse(f"\\boxed{{{text}}}", as_latex, parsing_timeout=None) for text in (gold, answer)]
    return verify(*sides, timeout_seconds=None)


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


def serve() -> None:
    sys.dont_write_bytecode = True
    logging.disable(logging.CRITICAL)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    for number in (1, 2):  # what a library prints would mix with the replies
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    for compare in (strictly, as_published):  # loads what sympy loads late
        holds(lambda: compare("\\frac{1}{2}", "x^2+1"))  # noqa: B023 - called at once
    sys.addaudithook(guard)
    print("ready", file=replies)
    for line in sys.stdin:
        rules, gold, answer, seconds = json.loads(line)
        limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)
        compare = {"strict": strictly, "published": as_published}[rules]
        print(json.dumps(holds(lambda: compare(gold, answer))), file=replies)  # noqa: B023 - called at once


if __name__ == "__main__":
    serve()
