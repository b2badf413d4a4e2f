"""Lines of JSON objects over a socket that is not waited for."""

from __future__ import annotations

import array
import contextlib
import json
import select
import socket
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["LINE_MAX", "Lines"]

LINE_MAX = 1 << 16
_PIECE = 65536
_FDS_MAX = 16


class Lines:
    """A non-blocking socket that carries lines of JSON objects.

    With ``takes_fds`` the descriptors that come along are in ``fds``, for the caller to take out.
    """

    def __init__(self, connection: socket.socket, *, takes_fds: bool = False) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._received = bytearray()
        self._unsent = bytearray()
        self._takes_fds = takes_fds
        self.fds: list[int] = []
        self.closed = False

    def fileno(self) -> int:
        return self.connection.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._unsent)

    def source(self, handle: Callable[[], None]) -> dict[int, tuple[int, Callable[[], None]]]:
        """Return what to wait for (:data:`~pyqmigrate.vm.incoming.keeper.loop.Sources`): ``handle`` is
        called when there is something to receive."""

        def work() -> None:
            self.flush()
            handle()

        return {self.fileno(): (select.POLLIN | (select.POLLOUT if self._unsent else 0), work)}

    def receive(self) -> list[dict[str, Any]]:
        """Return what has come. Sets ``closed`` at the end, and for what is not a line."""
        while not self.closed:
            try:
                data = self._receive()
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            self._received += data
            if len(data) < _PIECE:
                break
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        if len(rest) > LINE_MAX:
            self.closed = True
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
        return found

    def _receive(self) -> bytes:
        if not self._takes_fds:
            return self.connection.recv(_PIECE)
        size = array.array("i").itemsize
        data, ancillary, _, _ = self.connection.recvmsg(
            _PIECE, socket.CMSG_SPACE(_FDS_MAX * size), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self.fds += array.array("i", content[: len(content) // size * size])
        return data

    def send(self, value: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a line, as much of it as goes; the rest follows with :meth:`flush`.

        ``fds`` come with it, if nothing is unsent.
        """
        line = json.dumps(value).encode() + b"\n"
        if fds:
            try:
                sent = socket.send_fds(self.connection, [line], list(fds))
            except OSError:
                self.closed = True
                return
            line = line[sent:]
        self._unsent += line
        self.flush()

    def flush(self) -> None:
        while self._unsent and not self.closed:
            try:
                done = self.connection.send(self._unsent, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if len(self._unsent) > 16 * LINE_MAX:  # nobody reads them
                    self.closed = True
                return
            except OSError:
                self.closed = True
                return
            del self._unsent[:done]

    def close(self) -> None:
        self.closed = True
        self.connection.close()
