"""A UNIX socket that listens at a path: its name, and who is at the other end."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from pyqmigrate.errors import TargetError
from pyqmigrate.io.listening_socket import ListeningSocket, peer_of
from pyqmigrate.io.socket_path import SocketPath


def connected(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    with SocketPath(path) as name:
        client.connect(name.path)
    return client


def test_client_is_known_by_its_process_and_user(tmp_path: Path) -> None:
    place = tmp_path / "socket"
    with ListeningSocket(place, "the socket") as listening, connected(place):
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        accepted, _ = listening.socket.accept()
        with accepted:
            assert peer_of(accepted) == (os.getpid(), os.geteuid())
    assert not place.exists()


def test_path_may_be_longer_than_a_socket_name(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    with ListeningSocket(directory / "socket", "the socket"):
        connected(directory / "socket").close()
    assert not (directory / "socket").exists()


def test_socket_without_a_listener_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(place))
    with ListeningSocket(place, "the socket"):
        connected(place).close()


def test_name_that_another_process_has_taken_is_not_removed(tmp_path: Path) -> None:
    place = tmp_path / "socket"
    listening = ListeningSocket(place, "the socket")
    place.unlink()
    place.write_text("mine")
    listening.close()
    listening.close()
    assert place.read_text() == "mine"


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot listen on the socket") as raised:
        ListeningSocket(tmp_path / "missing" / "socket", "the socket")
    assert raised.value.filename == str(tmp_path / "missing" / "socket")
