"""What docstrings and comments cite is in the repository, under the title that they give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INTERNALS = ROOT / "docs" / "internals"
CODE = sorted(
    path
    for folder in ("pyqmigrate", "csrc", "tests", "bench", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".pyi", ".c", ".h"} and path != Path(__file__).resolve()
)
CITATION = re.compile(r'docs/internals/([\w-]+\.md)((?:(?:, | and )"[^"]+")*)')
OTHER_FORM = re.compile(
    r"(?:format|management) document\b(?!s)|\bsections? \d(?!x)|§", re.IGNORECASE
)


def text_of(path: Path) -> str:
    """The text of a file in one line, without the marks at the start of a comment's lines."""
    return re.sub(r"\s*\n\s*(?:#:? |\* |// )?", " ", path.read_text(encoding="utf-8"))


def citations() -> list[tuple[Path, str, str]]:
    """Each citation: the file that cites, the page, and the title of the section."""
    return [
        (path.relative_to(ROOT), page, title)
        for path in CODE
        for page, titles in CITATION.findall(text_of(path))
        for title in re.findall(r'"([^"]+)"', titles)
    ]


def headings(page: str) -> list[str]:
    text = re.sub(
        r"^```.*?^```", "", (INTERNALS / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


@pytest.mark.parametrize(("path", "page", "title"), citations(), ids=str)
def test_a_cited_section_exists(path: Path, page: str, title: str) -> None:
    assert title in headings(page)


def test_both_documents_are_cited() -> None:
    assert {page for _, page, _ in citations()} >= {"format.md", "qemu-management.md"}


def test_a_title_names_one_section() -> None:
    for page in {page for _, page, _ in citations()}:
        assert len(headings(page)) == len(set(headings(page)))


def test_nothing_is_cited_in_another_form() -> None:
    assert [path for path in CODE if OTHER_FORM.search(text_of(path))] == []
