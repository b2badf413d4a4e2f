"""A destination that closes the connection when it has everything says so before; that is not overheard."""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack
from pathlib import Path

from pyqmigrate.page_server.options import Ending
from pyqmigrate.page_server.serving import ServeRequest
from tests.harness.lazy_destination import PAGE, Destination, Memory
from tests.harness.page_serving import Serving
from tests.harness.snapshots import save_known

REQUESTS = 400


class HastyDestination(Destination):
    """Asks for zero pages, ends the migration and hangs up: the answers cannot be sent any more."""

    def answer(self, kind: int, body: bytes, more: bytes = b"") -> None:
        if kind == 1:
            range_ = [struct.pack(">QI", self.zero * PAGE, PAGE), b"\x03ram"]
            named = struct.pack(">HH", 3, 16) + b"".join(range_)
            self._connection.sendall(named * REQUESTS + struct.pack(">HH", 1, 4) + body)
        else:
            super().answer(kind, body, more)

    zero = 0


def test_end_that_comes_with_requests_is_the_end(tmp_path: Path) -> None:
    content = save_known(tmp_path / "a")
    HastyDestination.zero = content.reshape(-1, PAGE).any(axis=1).tolist().index(False)
    for _ in range(20):
        memory = Memory()
        ours, theirs = socket.socketpair()
        with ExitStack() as stack:
            destination = HastyDestination(theirs, memory).start()
            stack.callback(destination.join)
            serving = stack.enter_context(Serving(ServeRequest(str(tmp_path / "a")), ours))
            destination.join()
            serving.parent.close()
            serving.join()
            assert destination.error is None
            assert serving.ending is Ending.DONE
