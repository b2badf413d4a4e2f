"""A server that asks its parent sends the end when it is told to, or when the parent has gone."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pyqmigrate.page_server.options import Ending, Push
from pyqmigrate.page_server.serving import ServeRequest
from tests.harness.lazy_destination import Destination, Memory
from tests.harness.page_serving import Serving
from tests.harness.snapshots import save_known


@contextmanager
def all_sent(path: Path, memory: Memory) -> Iterator[tuple[Serving, Destination]]:
    """A server of which only the end is missing."""
    save_known(path)
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        destination = Destination(theirs, memory).start()
        stack.callback(destination.join)
        serving = stack.enter_context(Serving(ServeRequest(str(path), confirm_end=True), ours))
        stack.callback(destination.cut)
        assert serving.wait_for("sent")["pages_left"] == 0
        time.sleep(0.05)
        assert not memory.ended
        yield serving, destination


def test_end_is_sent_on_command(tmp_path: Path) -> None:
    with all_sent(tmp_path / "a", memory := Memory()) as (serving, destination):
        zero = next(page for page in range(512) if page not in memory.arrived["ram"])
        destination.request("ram", zero)  # is answered all the same
        while zero not in memory.arrived["ram"]:
            time.sleep(0.002)
        serving.parent.sendall(b'{"command": "end"}\n')
        destination.join()
        serving.join()
    assert memory.ended
    assert serving.ending is Ending.DONE
    assert len(serving.named("sent")) == 1


def test_end_is_sent_when_the_parent_has_gone(tmp_path: Path) -> None:
    with all_sent(tmp_path / "a", memory := Memory()) as (serving, destination):
        serving.parent.close()
        destination.join()
    assert memory.ended


def test_command_that_comes_too_early_has_no_effect(tmp_path: Path) -> None:
    save_known(tmp_path / "a")
    memory = Memory()
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        destination = Destination(theirs, memory).start()
        stack.callback(destination.join)
        request = ServeRequest(str(tmp_path / "a"), confirm_end=True, push=Push.NEVER)
        serving = stack.enter_context(Serving(request, ours))
        stack.callback(destination.cut)
        serving.wait_for("loaded")
        serving.parent.sendall(b'{"command": "end"}\n{"command": "push", "policy": "always"}\n')
        serving.wait_for("sent")
        time.sleep(0.05)
        assert not memory.ended
