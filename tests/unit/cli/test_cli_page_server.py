"""``pyqmigrate page-server``, run as a user runs it; QEMU is played by a Python destination."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness.command import Command
from tests.harness.json_page import assert_as_documented
from tests.harness.lazy_destination import Destination, Memory
from tests.harness.snapshots import save_known


@contextmanager
def listening(path: Path, memory: Memory, limit: int | None = None) -> Iterator[list[Destination]]:
    """Listen as QEMU does; yields the destinations that have connected."""
    found: list[Destination] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(20)

        def accept() -> None:
            found.append(Destination(listener.accept()[0], memory, limit).start())

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield found
        finally:
            thread.join()
            for destination in found:
                destination.join()


def test_snapshot_is_served(tmp_path: Path, command: Command) -> None:
    content = save_known(tmp_path / "a")
    memory = Memory()
    with listening(tmp_path / "s", memory):
        ran = command("page-server", "--json", tmp_path / "a", "--socket", tmp_path / "s")
    assert ran.code == 0
    assert_as_documented("page-server", ran.json)
    assert ran.json["complete"]
    assert ran.json["pages_left"] == 0
    assert bytes(memory.blocks["ram"]) == content.tobytes()


def test_broken_connection_is_an_error_and_resume_goes_on(tmp_path: Path, command: Command) -> None:
    content = save_known(tmp_path / "a")
    memory = Memory()
    with listening(tmp_path / "s", memory, 50_000):
        ran = command("page-server", tmp_path / "a", "--socket", tmp_path / "s")
    assert ran.code == 4
    assert "go on with --resume" in ran.out
    with listening(tmp_path / "t", memory):
        ran = command("page-server", tmp_path / "a", "--socket", tmp_path / "t", "--resume")
    assert ran.code == 0
    assert bytes(memory.blocks["ram"]) == content.tobytes()


def test_socket_at_which_no_qemu_listens_is_an_error(tmp_path: Path, command: Command) -> None:
    save_known(tmp_path / "a")
    ran = command("page-server", tmp_path / "a", "--socket", tmp_path / "s")
    assert ran.code == 3
    assert "cannot connect to QEMU" in ran.err


@pytest.mark.parametrize("text", ["ram", "=4096", "ram=much"])
def test_page_size_that_cannot_be_is_refused(tmp_path: Path, command: Command, text: str) -> None:
    ran = command("page-server", tmp_path / "a", "--socket", tmp_path / "s", "--host-pages", text)
    assert ran.code == 2
    assert "--host-pages" in ran.err


def ask(status: Path, destinations: list[Destination], found: list[dict[str, Any]]) -> None:
    """Ask for the status until it has numbers; then end the connection."""
    deadline = time.monotonic() + 20
    while not found and time.monotonic() < deadline:
        time.sleep(0.01)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(status))
            answer = json.loads(asking.makefile().readline())
            found += [answer] if answer else []
    for destination in destinations:
        destination.cut()


def test_status_socket_shows_how_far_it_is(tmp_path: Path, command: Command) -> None:
    save_known(tmp_path / "a")
    found: list[dict[str, Any]] = []
    status = tmp_path / "status"
    with listening(tmp_path / "s", Memory()) as destinations:
        asking = threading.Thread(target=ask, args=(status, destinations, found))
        asking.start()
        options = ["--push", "never", "--status-socket", status]
        ran = command("page-server", tmp_path / "a", "--socket", tmp_path / "s", *options)
        asking.join()
    assert ran.code == 4
    assert not status.exists()
    assert found[0]["pages_left"] == found[0]["data_pages"] > 0
