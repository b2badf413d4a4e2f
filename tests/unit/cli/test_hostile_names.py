"""Names that could control a terminal or a page, in the verbs that look into a snapshot."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.harness.command import Command, make_snapshot, pages

NAME = "\x1b]0;owned\x07</script>\u202e"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    path = tmp_path / "s"
    make_snapshot(path, {NAME: pages(3)}, machine="\x1b[2J")
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("map",),
        ("find", "00", "--hex", "--context", "4"),
        ("find", "\x01", "--regex"),
        ("strings",),
        ("read", f"{NAME}:0", "16"),
        ("read", "nothing:0", "16"),
    ],
    ids=str,
)
def test_no_verb_prints_what_could_control_a_terminal(
    words: tuple[str, ...], hostile: Path, command: Command
) -> None:
    ran = command(words[0], hostile, *words[1:])
    shown = (ran.out + ran.err).replace("\t", "")  # a string may have tabs
    assert all(line.isprintable() for line in shown.split("\n"))


def test_pictures_have_such_names_as_text(hostile: Path, tmp_path: Path, command: Command) -> None:
    assert command("map", hostile, "--svg", tmp_path / "m.svg").code == 0
    shown = "".join(ET.fromstring((tmp_path / "m.svg").read_bytes()).itertext())
    assert r"\x1b]0;owned\x07</script>" in shown
    assert command("map", hostile, "--html", tmp_path / "m.html").code == 0
    page = (tmp_path / "m.html").read_text()
    assert r"owned\\x07\u003c/script>" in page
    assert "owned\x07" not in page
