"""Descriptors that are inherited from the caller and passed to QEMU."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.incoming.inherited_fds import (
    check_descriptors,
    descriptors_in_use,
    inherited_descriptors,
)
from pyqmigrate.vm.qemu.command_line import CommandLine


def in_use(*words: str) -> list[str]:
    return sorted(descriptors_in_use(CommandLine.parse(["qemu", *words])))


def test_descriptor_is_passed_on_unless_it_is_closed_on_exec(tmp_path: Path) -> None:
    with (tmp_path / "own").open("w") as own, (tmp_path / "given").open("w") as given:
        os.set_inheritable(given.fileno(), True)
        found = inherited_descriptors()
        assert given.fileno() in found
        assert own.fileno() not in found
    assert not {0, 1, 2} & set(found)


@pytest.mark.parametrize("fd", [-1, 987654, 1 << 70])
def test_descriptor_that_is_not_open_is_refused(fd: int) -> None:
    with pytest.raises(UsageError, match=f"descriptor {fd} is not open"):
        check_descriptors([fd])


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["-add-fd", "fd=501,set=1"], [501]),
        (["-netdev", "tap,id=n,fds=501:502,vhostfds=503:504"], [501, 502, 503, 504]),
        (["-netdev", '{"type":"tap","id":"n","fd":"501","vhostfd":"502"}'], [501, 502]),
        (["-netdev", "stream,id=n,addr.type=fd,addr.str=501"], [501]),
        (["-chardev", "socket,id=c,fd=501"], [501]),
        (["-netdev", "tap,id=n,fd=by-name"], []),
        (["-netdev", "user,id=n"], []),
    ],
)
def test_descriptor_that_the_command_line_names_serves_one_guest(
    words: list[str], numbers: list[int]
) -> None:
    assert in_use(*words) == [f"descriptor {number}" for number in numbers]


def test_file_that_is_only_read_serves_many(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with (tmp_path / "f").open("rb") as reading, (tmp_path / "f").open("r+b") as writing:
        one, other = socket.socketpair()
        with one, other:
            assert in_use("-add-fd", f"fd={reading.fileno()},set=1") == []
            assert in_use("-add-fd", f"fd={writing.fileno()},set=1")
            assert in_use("-add-fd", f"fd={one.fileno()},set=1")


def test_configuration_through_a_pipe_serves_one_guest(tmp_path: Path) -> None:
    (tmp_path / "cfg").touch()
    assert in_use("-readconfig", str(tmp_path / "cfg")) == []
    assert in_use("-readconfig", "/dev/null") == ["the input of /dev/null"]
