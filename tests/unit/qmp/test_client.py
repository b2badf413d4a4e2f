"""The blocking client, against this package's server and against sockets that misbehave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import QemuRefused
from pyqmigrate.qmp import QmpClient
from tests.harness.qmp_server import ServerThread

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
NEGOTIATED = b'{"return": {}, "id": 1}\r\n'


@pytest.fixture
def answers() -> Iterator[Callable[[bytes], socket.socket]]:
    """Make a socket on which a server has already sent these bytes, and then hangs up."""

    def connected(sent: bytes) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        kept.append(theirs)
        return ours

    kept: list[socket.socket] = []
    yield connected
    for connection in kept:
        connection.close()


def test_a_command_returns_its_result(server: ServerThread) -> None:
    with QmpClient.connect(server.path) as client:
        assert client.greeting["version"]["qemu"]["major"] == 10
        assert client.execute("query-fdsets") == []


def test_a_descriptor_goes_with_its_command(server: ServerThread, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        with QmpClient.connect(server.path) as client:
            added = client.execute("add-fd", {"fdset-id": 4}, fd=fd)
            assert added["fdset-id"] == 4
            assert client.execute("query-fdsets")[0]["fds"] == [{"fd": added["fd"]}]
        os.fstat(fd)  # still the caller's
    finally:
        os.close(fd)


def test_an_error_reply_is_raised_and_the_session_goes_on(server: ServerThread) -> None:
    with QmpClient.connect(server.path) as client:
        with pytest.raises(QemuRefused) as refused:
            client.execute("remove-fd", {"fdset-id": 7})
        assert refused.value.desc == "File descriptor named 'fdset-id:7' not found"
        assert refused.value.error_class == "GenericError"
        assert client.execute("query-fdsets") == []


def test_events_are_kept(server: ServerThread) -> None:
    with QmpClient.connect(server.path) as client:
        client.execute("stop")
        client.execute("query-status")
        assert [event["event"] for event in client.events] == ["STOP"]


def test_an_event_before_the_greeting_is_kept(answers: Callable[[bytes], socket.socket]) -> None:
    connection = answers(b'{"event": "RESUME"}\r\n' + GREETING + NEGOTIATED)
    with QmpClient(connection) as client:
        assert client.events == [{"event": "RESUME"}]


@pytest.mark.parametrize("sent", [b"", GREETING, GREETING + b'{"return"'])
def test_a_server_that_hangs_up_is_a_connection_error(
    sent: bytes, answers: Callable[[bytes], socket.socket]
) -> None:
    connection = answers(sent)
    with pytest.raises(ConnectionError):
        QmpClient(connection)
    assert connection.fileno() == -1


@pytest.mark.parametrize("sent", [b"220 mail ready\r\n", b"[1]\r\n", b'{"return": {}}\r\n'])
def test_a_server_of_another_protocol_is_a_value_error(
    sent: bytes, answers: Callable[[bytes], socket.socket]
) -> None:
    with pytest.raises(ValueError, match=r"QMP|JSON|Extra data"):
        QmpClient(answers(sent))


def test_a_reply_that_does_not_come_is_a_timeout() -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(TimeoutError):
        QmpClient(ours, timeout=0.05)


def test_a_large_reply_and_a_large_command_arrive_whole() -> None:
    ours, theirs = socket.socketpair()
    text = "x" * (1 << 21)

    def serve() -> None:
        file = theirs.makefile("rwb")
        file.write(GREETING)
        file.flush()
        for _ in range(2):
            request = file.readline()
            number = b"1" if b"qmp_capabilities" in request else b"2"
            size = str(len(request)).encode()
            file.write(b'{"return": [' + size + b', "' + text.encode() + b'"], "id": ' + number)
            file.write(b"}\r\n")
            file.flush()

    thread = threading.Thread(target=serve)
    thread.start()
    with theirs, QmpClient(ours) as client:
        length, answer = client.execute("human-monitor-command", {"command-line": text})
        thread.join()
    assert length > len(text)
    assert answer == text


def test_the_client_needs_neither_asyncio_nor_the_server() -> None:
    program = (
        "import sys, pyqmigrate.qmp.client; "
        "print([m for m in sys.modules if m in ('asyncio', 'pyqmigrate.qmp.server')])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
