"""Chain problems: what the tiny reasoner is trained and tested on. Pure Python, knows no model.

A question lists shuffled definitions. `p g *3 +m ;` reads "from p one gets g = (p * 3 + m) mod 10",
evaluated strictly left to right; `so m 8 ;` is the start value; `e ? <think>` asks for e. The solution
walks the chain, restating what it looks up (`use p g *3 +m get p 5 get m 8 , 5 *3 +8 = 3 so g 3 .`), with
redundant checks and filler between the steps, then recaps every value and ends in `ans 3 <eos>`.

Every look-up is one hop, "find this token, copy what followed it", and a word before the name says what
is wanted: `use` a definition, `get` a value; `so` tells a value.

A step of level n carries n operators. Multipliers are units modulo 10, so values stay uniform and
guessing is right one time in ten at every level.
"""

import random
from dataclasses import dataclass

NAMES = tuple("abcdefghijklmnop")
DIGITS = tuple("0123456789")
UNITS = ("3", "7", "9")
FILLERS = (
    "hmm let me think .",
    "ok good until here .",
    "now on to the next one .",
    "that looks fine .",
    "let us keep going .",
    "wait this needs some care .",
)
WORDS = sorted({word for filler in FILLERS for word in filler.split()} - {"."})
SPECIAL = ("<pad>", "<eos>", "<think>", "</think>")
VOCABULARY = (
    *SPECIAL,
    *NAMES,
    *DIGITS,
    *(f"+{x}" for x in NAMES + DIGITS),
    *(f"*{x}" for x in UNITS),
    *("use", "get", "so", "check", "ans", ";", ",", ".", ":", "?", "="),
    *WORDS,
)
P_LOOK_BACK = 0.8
P_CHECK = 0.6
P_FILLER = 0.6


@dataclass(frozen=True)
class Step:
    """target = source put through the operators, left to right, modulo 10."""

    source: str
    target: str
    operators: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return [self.source, self.target, *self.operators]


@dataclass(frozen=True)
class Chain:
    """One problem: the steps in order, the start value, and the values of all variables."""

    steps: tuple[Step, ...]
    values: dict[str, int]
    question: str

    @property
    def answer(self) -> str:
        return str(self.values[self.steps[-1].target])


def _operators(rng: random.Random, level: int, earlier: list[str]) -> tuple[str, ...]:
    look_back = earlier and rng.random() < P_LOOK_BACK
    operand = rng.choice(earlier) if look_back else rng.choice(DIGITS)
    if level == 1:
        return (f"+{operand}",)
    operators = [f"*{rng.choice(UNITS)}", f"+{operand}"]
    while len(operators) < level:
        last_adds = operators[-1].startswith("+")
        operators.append(f"*{rng.choice(UNITS)}" if last_adds else f"+{rng.choice(DIGITS)}")
    return tuple(operators)


def _substituted(step: Step, values: dict[str, int]) -> list[str]:
    """The operators with variables replaced by their values: `+m` becomes `+8`."""
    return [f"{op[0]}{values[op[1:]]}" if op[1:] in NAMES else op for op in step.operators]


def _evaluate(value: int, operators: list[str]) -> int:
    for op in operators:
        operand = int(op[1:])
        value = value * operand if op[0] == "*" else value + operand
    return value % 10


def make_chain(rng: random.Random, n_steps: int, level_weights: tuple[float, ...]) -> Chain:
    """Draw one problem of `n_steps` steps; `level_weights[i]` weighs a step of level i + 1."""
    names = rng.sample(NAMES, n_steps + 1)
    levels = rng.choices(range(1, len(level_weights) + 1), level_weights, k=n_steps)
    values = {names[0]: rng.randrange(10)}
    steps = []
    for i, level in enumerate(levels):
        step = Step(names[i], names[i + 1], _operators(rng, level, names[:i]))
        values[step.target] = _evaluate(values[step.source], _substituted(step, values))
        steps.append(step)
    definitions = [" ".join(step.words) + " ;" for step in steps] + [f"so {names[0]} {values[names[0]]} ;"]
    rng.shuffle(definitions)
    return Chain(tuple(steps), values, " ".join([*definitions, names[-1], "? <think>"]))


def solution_words(rng: random.Random, chain: Chain) -> tuple[list[str], list[bool]]:
    """A worked solution and, per word, whether it is a look-up (of a definition, a value or the stop)."""
    said: list[tuple[str, int]] = []  # a text, and how many of its last words are looked up

    def definition(step: Step) -> tuple[str, int]:
        return f"use {step.source} {step.target}", 1

    def value(name: str) -> tuple[str, int]:
        return f"get {name} {chain.values[name]}", 1

    for step in chain.steps:
        result = chain.values[step.target]
        calculation = f"{chain.values[step.source]} {' '.join(_substituted(step, chain.values))} = {result}"
        said += [definition(step), (" ".join(step.operators), len(step.operators)), value(step.source)]
        said += [value(op[1:]) for op in step.operators if op[1:] in NAMES]
        said += [(f", {calculation}", 1), (f"so {step.target} {result}", 1), (".", 0)]
        if rng.random() < P_CHECK:
            said.append((f"check : {calculation} .", 0))
        if rng.random() < P_FILLER:
            said.append((rng.choice(FILLERS), 0))
    said += [(f"use {chain.steps[-1].target} ?", 1), ("</think>", 0), value(chain.steps[0].source)]
    for step in chain.steps:
        said += [definition(step), value(step.target)]
    said += [(f"ans {chain.answer}", 1), ("<eos>", 0)]
    words, is_lookup = [], []
    for text, lookups in said:
        spoken = text.split()
        words += spoken
        is_lookup += [False] * (len(spoken) - lookups) + [True] * lookups
    return words, is_lookup


def definition_drill(rng: random.Random, chain: Chain, n_lookups: int) -> tuple[list[str], list[bool]]:
    """Definitions of the question asked back in random order; per word, whether it is copied and not asked at random.

    Drills create the look-up (induction) heads that the sparser look-ups of solutions form late or not at all.
    """
    words: list[str] = []
    is_copied: list[bool] = []
    for step in rng.choices(chain.steps, k=n_lookups):
        words += ["use", *step.words]
        is_copied += [False, False] + [True] * (len(step.words) - 1)
    return words, is_copied


def value_drill(rng: random.Random, n_names: int, n_lookups: int) -> tuple[list[str], list[bool]]:
    """Values told once and asked back in random order: `so m 8 . so g 3 . get m 8 get g 3 ...`, marked as above."""
    values = {name: rng.choice(DIGITS) for name in rng.sample(NAMES, n_names)}
    words = " ".join(f"so {name} {value} ." for name, value in values.items()).split()
    is_copied = [False] * len(words)
    for name in rng.choices(list(values), k=n_lookups):
        words += ["get", name, values[name]]
        is_copied += [False, False, True]
    return words, is_copied


def extract_answer(text: str) -> str | None:
    """The digit of the last `ans D <eos>` after `</think>`, or None. Exact: nothing else counts as an answer."""
    words = text.split()
    if "</think>" not in words:
        return None
    tail = words[len(words) - words[::-1].index("</think>") :]
    if len(tail) >= 3 and tail[-3] == "ans" and tail[-2] in DIGITS and tail[-1] == "<eos>":
        return tail[-2]
    return None
