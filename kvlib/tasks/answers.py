r"""What an output answers: by the rules of the published protocol, and by strict ones. Knows text only.

Published rules, those of the source's grader (an adapted copy of Qwen2.5-Math's): read what follows the last
`</think>`, or the whole text if there is none; take the last \boxed{...}, else what follows "the answer is", else the
last number; of a choice, the last letter A to E standing alone, whatever it is doing there. Strict rules: only what
follows the last `</think>` (all of it, of a model that does not think), and there only the last \boxed{...} that holds
anything and whose braces balance.
"""

import re

# The token that ends an output, as decoders write it.
END_TOKEN = re.compile(r"(?:<[|｜][^<>]{1,40}[|｜]>|</s>|<eos>)$")
# What opens a box, and the other signs that count while its braces are matched.
STRICT_BOX = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
PUBLISHED_BOX = re.compile(r"(?P<box>boxed\{)|[{}]")
SOLUTION_BOX = re.compile(
    r"(?P<box>\\f?box(?:ed)?\s*\{)|\\f?box(?:ed)?(?![a-zA-Z])\s*(?P<bare>(?:[^\s${}]|\{[^{}]*\})+(?<![.,;]))"
    r"|\\.|[{}]",
    re.DOTALL,
)
NUMBER = re.compile(r"-?\d*\.?\d+")
LETTER = re.compile(r"\b[A-E]\b")
CHOICE_WORDS = re.compile("choice is|answer is")
FONT = re.compile(r"\\(?:text|math)(?:bf|rm|sf|it|tt)?\b|\\(?:mbox|bf|rm)\b|\\[ ,;!]|[{}$*]")
# In a box: C, (C), c. or, with the option's text, C) 42
BOXED_LETTER = re.compile(r"[(\[]?([A-E])(?:[)\]]?[.:]?$|[)\].:])", re.IGNORECASE)
LONGEST = 300  # characters; no answer of a benchmark comes near, and what reads an answer further may be slow
# Units that stand alone in an answer and are dropped from it; the source's list is longer and has single letters too.
UNITS = (
    "degrees?|deg|radians?|miles?|mph|feet|foot|ft|inch(?:es)?|yards?|kilomet(?:er|re)s?|met(?:er|re)s?|"
    "centimet(?:er|re)s?|millimet(?:er|re)s?|km|cm|mm|dm|kmh|kg|grams?|gm|pounds?|lbs?|lit(?:er|re)s?|gallons?|"
    "acres?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|months?|years?|yrs?|percent|dollars?|cents?|units?|"
    "sq|square|cubic|coins?|points?|apples?|men|women|people|students?|ways?|[acdghlmost]"
)
ALONE = re.compile(rf"(^|\W)(?:{UNITS})(?=\W|$)")


def after_thinking(output: str) -> str | None:
    """What follows the last `</think>`, less the token that ends an output; None if thinking never ended."""
    _, end, answer = without_end_token(output).rpartition("</think>")
    return answer if end else None


def without_end_token(output: str) -> str:
    return END_TOKEN.sub("", output.rstrip()).rstrip()


def boxes(text: str, rules: re.Pattern) -> list[tuple[int, int]]:
    """Where the contents of boxes whose braces balance begin and end, in the order in which the boxes open."""
    opened: list[tuple[bool, int]] = []
    found = []
    for match in rules.finditer(text):
        kind = match.lastgroup
        if kind == "bare":
            found.append(match.span("bare"))
        elif kind == "box" or match[0] == "{":
            opened.append((kind == "box", match.end()))
        elif match[0] == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                found.append((start, match.start()))
    return sorted(found)


def last_boxed(text: str, rules: re.Pattern = STRICT_BOX) -> str | None:
    """What the last box that is not empty holds; None if there is none."""
    contents = (text[start:end].strip() for start, end in reversed(boxes(text, rules)))
    return next(filter(None, contents), None)


def solution_answer(solution: str) -> str | None:
    r"""What a worked solution ends in: MATH's \boxed{2}, \fbox{2} or \boxed 2, else what follows GSM8K's ####."""
    boxed = last_boxed(solution, SOLUTION_BOX)
    if boxed is None and "####" in solution:
        boxed = solution.rpartition("####")[2].strip().split("\n")[0].strip()
    return boxed or None


def published_answer(output: str, is_choice: bool) -> str | None:
    """The answer by the published rules, in their spelling; None if not even a number or a letter is there."""
    text = after_thinking(output)
    text = without_end_token(output) if text is None else text
    return (_published_choice(text) if is_choice else _published_math(text)) or None


def _published_math(text: str) -> str:
    if "final answer is $" in text and "$. I hope" in text:
        found = text.split("final answer is $", 1)[1].split("$. I hope", 1)[0]
    elif "boxed" in text:
        rest = text.rpartition("boxed")[2]
        braced = boxes(f"boxed{rest}", PUBLISHED_BOX)  # else to the end, or, braceless, to a dollar
        found = rest[1 : braced[0][1] - 5] if braced else rest[1:] if rest.startswith("{") else rest.split("$")[0]
    elif "he answer is" in text:
        found = text.rpartition("he answer is")[2]
    elif "答案是" in text:
        found = text.split("答案是")[1].strip().split("\n\n")[0]
    else:
        numbers = NUMBER.findall(text.replace(",", ""))
        found = numbers[-1] if numbers else ""
    found = re.sub(r"\n\s*", "", found.strip()[:LONGEST])
    return tidy(found.removeprefix(":").removesuffix(".").removesuffix("/"))[:LONGEST]


def _published_choice(text: str) -> str:
    """The first letter after the last "answer is" or "choice is"; without those words, the last letter of all."""
    text = text.strip("\n")
    if any(text.count(words) > 1 for words in CHOICE_WORDS.pattern.split("|")):
        text = text.split("\n\n")[0]
    said = CHOICE_WORDS.split(text)
    letters = LETTER.findall(said[-1].upper())
    if letters:
        return letters[0] if len(said) > 1 else letters[-1]
    return ""


def tidy(answer: str) -> str:
    """An answer in the published rules' one spelling: no units, percent, dollars, degrees, spaces; \\frac for all."""
    text = answer.strip().replace("\n", "").rstrip(".").replace("\\!", "")
    text = re.sub(r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}", text).replace("\\end{array}", "\\end{pmatrix}")
    text = text.replace("bmatrix", "pmatrix").replace("tfrac", "frac").replace("dfrac", "frac")
    text = re.sub(r"\\(ne|le|ge)q", r"\\\1", text)
    text = text.replace("\\left", "").replace("\\right", "").replace("\\{", "{").replace("\\}", "}")
    text = re.sub(r"\\text\{[^{}]*\}$", "", text).strip() or text
    text = ALONE.sub(r"\1", text) if ALONE.sub("", text).strip() else text
    text = re.sub(r"\^\{?\\circ\}?|\\?\$|\\[()]", "", text)
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"[xyz](?:=|\\in(?![a-z])|\\to(?![a-z]))", "", text)
    text = re.sub(r"\\?%", "", text)
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    text = re.sub(r"\\mbox\{[^{}]*\}|\\mathbf|and", "", text)
    text = re.sub(r"(\d+)\.0*(?=\D|$)", r"\1", text)
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left.strip()) <= 2:
        text = right
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def strict_answer(output: str, letters: str = "", thinks: bool = True, longest: int | None = LONGEST) -> str | None:
    """The answer by the strict rules: what the last box after thinking holds; None if there is none.

    letters: of a choice, the ones there are; a box that holds anything but one of them answers nothing. thinks: of a
    model without a `</think>`, False, and boxes count wherever they are. longest: in characters; None for all.
    """
    boxed = last_boxed((after_thinking(output) or "") if thinks else output)
    if boxed is None or not letters:
        return boxed and boxed[:longest]
    letter = BOXED_LETTER.match(FONT.sub("", boxed[:longest]).strip())
    return letter[1].upper() if letter and letter[1].upper() in letters else None
