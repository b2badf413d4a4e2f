"""What of a command line goes together with a restore."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.command_line import CommandLine
from pyqmigrate.vm.incoming import make_incoming


def made(text: str, *, paused: bool | None = None, qmp: Path | None = None
         ) -> tuple[list[str], list[str]]:
    command = CommandLine.parse(["qemu", *text.split()])
    command, notes = make_incoming(command, paused=paused, qmp=qmp)
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
    [("-S", None, True), ("", None, False), ("", True, True), ("-S", True, True),
     ("-S", False, False)],
)  # fmt: skip
def test_guest_stays_paused_when_that_is_asked(
    text: str, paused: bool | None, stays: bool
) -> None:
    words, notes = made(text, paused=paused)
    assert words.count("-S") == stays
    assert bool(notes) == (text == "-S" and paused is False)


def test_monitor_is_added_and_the_own_one_kept(tmp_path: Path) -> None:
    words, _ = made("-qmp unix:/a,server=on", qmp=tmp_path / "b,c.qmp")
    assert words.count("-qmp") == 2
    assert f"unix:{tmp_path}/b,,c.qmp,server=on,wait=off" in words


def test_monitor_that_is_in_use_is_not_taken_away(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()
        with pytest.raises(UsageError, match="another monitor listens"):
            made("-m 64", qmp=tmp_path / "qmp")


def test_monitor_that_nobody_serves_any_more_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
    assert "-qmp" in made("-m 64", qmp=tmp_path / "qmp")[0]


def test_monitor_in_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        made("-m 64", qmp=tmp_path / "none" / "qmp")


def test_monitor_with_too_long_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        made("-m 64", qmp=tmp_path / ("x" * 120))


@pytest.mark.parametrize("there", ["file", "directory", "fifo", "link"])
def test_a_file_in_the_way_of_the_monitor_is_refused_and_kept(tmp_path: Path, there: str) -> None:
    """QEMU removes whatever has the name."""
    path = tmp_path / "qmp"
    if there == "file":
        path.write_text("dear reader")
    elif there == "directory":
        path.mkdir()
    elif there == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    with pytest.raises(UsageError, match="is not a socket"):
        made("-m 64", qmp=path)
    assert os.path.lexists(path)
