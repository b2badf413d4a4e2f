"""A page server in a thread of the test, and destinations for it."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from pyqmigrate.page_server.control import Control
from pyqmigrate.page_server.server import Ending
from pyqmigrate.page_server.serving import ServeRequest, serve
from tests.harness.lazy_destination import Destination, Memory

__all__ = ["Serving", "received"]


class Serving:
    """``serve()`` in a thread. ``events`` are what it reported, ``ending`` and ``error`` how it ended."""

    def __init__(self, request: ServeRequest, connection: socket.socket) -> None:
        self.events: list[dict[str, Any]] = []
        self.ending: Ending | None = None
        self.error: Exception | None = None
        self.parent, theirs = socket.socketpair()
        self._control = Control(theirs)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(request, connection))
        self._thread.start()

    def _run(self, request: ServeRequest, connection: socket.socket) -> None:
        try:
            self.ending = serve(request, connection, self._report, self._control)
        except Exception as error:
            self.error = error
        finally:
            connection.close()
            self._control.close()

    def _report(self, event: dict[str, Any]) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]

    def wait_for(self, name: str, count: int = 1, limit: float = 30) -> dict[str, Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.named(name)) >= count, limit), name
            return self.named(name)[count - 1]

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server does not end"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.parent.close()
        self.join()


def received(snapshot: Path | str, **options: Any) -> Memory:
    """Return what a destination gets that asks for nothing; everything, in the end."""
    memory = Memory(options.get("host_pages", {}))
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        destination = Destination(theirs, memory).start()
        stack.callback(destination.join)
        serving = stack.enter_context(Serving(ServeRequest(str(snapshot), **options), ours))
        serving.join()
        destination.join()
    if serving.error is not None:
        raise serving.error
    if destination.error is not None:
        raise destination.error
    assert serving.ending is Ending.DONE
    return memory
