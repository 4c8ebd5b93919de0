"""The messages that docs/TROUBLESHOOTING.md quotes are those that the code gives."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text()


def plain(text: str) -> str:
    """Without what a string of several source lines has between its words."""
    return re.sub(r"[\s\"'`\\]+", "", re.sub(r"[\"']\s*\\?\n\s*f?[\"']", "", text))


SOURCE = plain("\n".join(p.read_text() for p in [ROOT / "Makefile", *sorted((ROOT / "kvlib").rglob("*.py"))]))


@pytest.mark.parametrize("message", re.findall(r"```text\n(.+?)\n```", PAGE, re.S))
def test_a_quoted_message_is_in_the_code(message):
    for part in re.split(r"…|\n", message):
        assert plain(part.replace("\\n", "")) in SOURCE, part
