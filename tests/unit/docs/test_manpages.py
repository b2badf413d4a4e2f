"""The manual pages have what the parser has, and ``man`` shows them."""

import argparse
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.cli import build_parser
from pyqmigrate.cli.arguments import Parser

PAGES = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "manpages.py"))["pages"]()


def parsers() -> Iterator[Parser]:
    """The parser of the command, and of every verb."""
    parser = build_parser()
    parser.load_verbs([], nested=True)
    found = [parser]
    while found:
        yield (parser := found.pop())
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()


@pytest.mark.parametrize("parser", list(parsers()), ids=lambda parser: parser.prog)
def test_page_has_every_option_and_argument(parser: Parser) -> None:
    text = PAGES[f"{parser.prog.replace(' ', '-')}.1"].replace(r"\-", "-")
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            names = list(action.choices)
        else:
            names = action.option_strings or [action.metavar or action.dest]
        for name in names:
            assert rf"\fB{name}\fR" in text, name


def test_there_is_a_page_for_each_parser() -> None:
    assert set(PAGES) == {f"{parser.prog.replace(' ', '-')}.1" for parser in parsers()}


def test_every_page_names_and_ends_as_man_expects() -> None:
    for name, text in PAGES.items():
        title = name.removesuffix(".1").replace("-", r"\-")
        assert re.search(rf"^\.SH NAME\n{re.escape(title)} \\?- \w", text, re.MULTILINE), name
        assert ".SH EXIT STATUS" in text
        assert ".SH SEE ALSO" in text


@pytest.mark.parametrize("name", PAGES)
def test_man_shows_the_page(name: str, tmp_path: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    page = tmp_path / name
    page.write_text(PAGES[name])
    ran = subprocess.run(
        ["man", "--warnings", "-l", str(page)],
        env={**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8", "MANPAGER": "cat"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stderr == ""
    assert max(map(len, ran.stdout.splitlines())) <= 100
    assert "general options" in ran.stdout.lower()
