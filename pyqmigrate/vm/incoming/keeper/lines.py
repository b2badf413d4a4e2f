"""Lines of JSON objects over a socket that is not waited for."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

__all__ = ["LINE_MAX", "Lines"]

LINE_MAX = 1 << 16


class Lines:
    """A non-blocking socket that carries lines of JSON objects."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._received = bytearray()
        self._unsent = bytearray()
        self.closed = False

    def fileno(self) -> int:
        return self.connection.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._unsent)

    def receive(self) -> list[dict[str, Any]]:
        """Return what has come. Sets ``closed`` at the end, and for what is not a line."""
        while not self.closed:
            try:
                data = self.connection.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            self._received += data
            if len(data) < 65536:
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

    def send(self, value: dict[str, Any]) -> None:
        """Send a line, as much of it as goes; the rest follows with :meth:`flush`."""
        self._unsent += json.dumps(value).encode() + b"\n"
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
