"""A page server in a thread of the test, and destinations for it."""

from __future__ import annotations

import contextlib
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from pyqmigrate.page_server.control import Control
from pyqmigrate.page_server.options import Ending
from pyqmigrate.page_server.serving import ServeRequest, serve
from tests.harness.lazy_destination import Destination, Memory

__all__ = ["Relay", "Serving", "received"]


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
            with self._changed:
                self.error = error
                self._changed.notify_all()
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
            assert self._changed.wait_for(
                lambda: len(self.named(name)) >= count or self.error is not None, limit
            ), name
            if self.error is not None:
                raise self.error
            return self.named(name)[count - 1]

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server does not end"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.parent.close()
        self.join()


class Relay:
    """Carries bytes between a server and a destination, until it cuts both off in the middle."""

    def __init__(self, server: socket.socket, destination: socket.socket) -> None:
        self._ends = (server, destination)
        self._lock = threading.Lock()
        self._left: int | None = None
        self._threads = [
            threading.Thread(target=self._carry, args=ends)
            for ends in ((server, destination, True), (destination, server, False))
        ]
        for thread in self._threads:
            thread.start()

    def cut_after(self, nbytes: int | None) -> None:
        """Cut after so many more bytes to the destination; None: never."""
        with self._lock:
            self._left = nbytes

    def _carry(self, source: socket.socket, target: socket.socket, forth: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    if forth and self._left is not None:
                        data = data[: self._left]
                        self._left -= len(data)
                target.sendall(data)
                if forth and self._left == 0:
                    break
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.join()
        for end in self._ends:
            end.close()


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
