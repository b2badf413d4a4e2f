"""The socket between a page server and its parent."""

from __future__ import annotations

import os
import socket

import pytest

from pyqmigrate.page_server.control import Control


@pytest.fixture
def ends() -> tuple[Control, socket.socket]:
    ours, theirs = socket.socketpair()
    return Control(ours), theirs


def test_connection_that_comes_along_is_not_inherited(ends: tuple[Control, socket.socket]) -> None:
    control, parent = ends
    passed, other = socket.socketpair()
    with parent, passed, other:
        socket.send_fds(parent, [b'{"command": "resume"}\n'], [passed.fileno()])
        [(command, connection)] = control.receive()
        assert command == {"command": "resume"}
        assert connection is not None
        with connection:
            assert os.fstat(connection.fileno()) == os.fstat(passed.fileno())
            assert not os.get_inheritable(connection.fileno())
    control.close()
