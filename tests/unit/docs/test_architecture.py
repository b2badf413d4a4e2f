"""The answers in architecture.md name files and functions that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "internals" / "architecture.md").read_text()
ANSWERS = re.findall(r"^\| [^|]*\? \| `([\w/]+\.\w+)`: `(\w+)`(?: of `(\w+)`)?", PAGE, re.MULTILINE)


def test_every_question_has_an_answer() -> None:
    questions = re.findall(r"^\| [^|]*\? \|", PAGE, re.MULTILINE)
    assert len(ANSWERS) == len(questions) >= 10


@pytest.mark.parametrize(("file", "name", "owner"), ANSWERS)
def test_answer_is_where_it_says(file: str, name: str, owner: str) -> None:
    text = (ROOT / file).read_text()
    definition = r"(?:def|class|static .*\b)\s*"
    for wanted in filter(None, (name, owner)):
        assert re.search(rf"{definition}{wanted}\b", text), wanted


def test_other_files_that_the_page_names_exist() -> None:
    for name in re.findall(r"`((?:[\w]+/)*[\w]+\.(?:py|c|h))`", PAGE):
        assert any(
            (ROOT / folder / name).exists()
            for folder in ("", "pyqmigrate", "pyqmigrate/vm/outgoing")
        ), name
