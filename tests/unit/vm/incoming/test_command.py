"""A command line is adapted to a restore, or refused."""

from __future__ import annotations

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.incoming.command import make_incoming
from pyqmigrate.vm.qemu.command_line import CommandLine


def made(text: str, *, paused: bool | None = None) -> tuple[list[str], list[str]]:
    command = CommandLine.parse(["qemu", *text.split()])
    command, notes = make_incoming(command, paused=paused)
    return command.argv()[1:], notes


def test_incoming_defer_is_added_once() -> None:
    assert made("-m 64 -incoming defer")[0] == ["-m", "64", "-incoming", "defer"]


@pytest.mark.parametrize(
    "text", ["-incoming tcp:0:4444", "--incoming file:/x", "-loadvm s", "-preconfig"]
)
def test_option_that_contradicts_a_restore_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=text.split()[0].lstrip("-")):
        made(text)


def test_daemonize_is_left_out_and_noted() -> None:
    words, notes = made("-daemonize -m 64")
    assert "-daemonize" not in words
    assert "daemonize" in notes[0]


@pytest.mark.parametrize(
    ("text", "paused", "stays"),
    [
        ("-S", None, True),
        ("", None, False),
        ("", True, True),
        ("-S", True, True),
        ("-S", False, False),
    ],
)
def test_guest_stays_paused_when_that_is_asked(text: str, paused: bool | None, stays: bool) -> None:
    words, notes = made(text, paused=paused)
    assert words.count("-S") == stays
    assert bool(notes) == (text == "-S" and paused is False)
