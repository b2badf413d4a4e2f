"""The socket over which the parent of a page server hears of it, and directs it.

Each message is an object of JSON on a line. The server sends events, with the key ``event``; the parent
sends commands, with the key ``command``:

- ``begin``, with the key ``host_pages``: the page sizes of the destination, for which a server that was
  started with ``--wait`` waits before it sends anything;
- ``resume``: go on over the socket that comes with the message (SCM_RIGHTS), after a broken connection;
- ``push``, with the key ``policy``: ``idle``, ``always`` or ``never``;
- ``end``: send the end, which an event ``sent`` has asked for (``--confirm-end``);
- ``status``: send an event ``progress`` now;
- ``stop``: end.

The server goes on without its parent: the guest needs its pages.
"""

from __future__ import annotations

import array
import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

__all__ = ["Control"]

_LINE_MAX = 1 << 16
_FD = array.array("i")


class Control:
    """The server's end of the socket; it is taken over. ``fd`` is None once the parent has gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = b""
        self._descriptors: list[int] = []
        self.gone = False

    @property
    def fd(self) -> int | None:
        """The descriptor to wait for."""
        return None if self.gone else self._connection.fileno()

    def send(self, event: dict[str, Any]) -> None:
        """Send an event; a parent that has gone hears nothing."""
        line = json.dumps(event).encode("ascii") + b"\n"
        try:
            self._connection.settimeout(1.0)  # a parent that does not read must not stop the guest
            self._connection.sendall(line)
        except OSError:
            self.gone = True

    def receive(self) -> Iterator[tuple[dict[str, Any], socket.socket | None]]:
        """Wait for bytes, and yield the commands that they complete, each with the socket that came along.
        Those that are no commands are left out."""
        try:
            self._connection.settimeout(None)
            data, ancillary, _, _ = self._connection.recvmsg(
                _LINE_MAX, socket.CMSG_SPACE(_FD.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, ancillary = b"", []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(content[: len(content) // found.itemsize * found.itemsize])
                self._descriptors += found
        if not data:
            self.gone = True
        self._data += data
        *lines, self._data = self._data.split(b"\n")
        if len(self._data) > _LINE_MAX:
            self._data, self.gone = b"", True
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                command = json.loads(line)
                if isinstance(command, dict):
                    yield command, self._socket(command)

    def _socket(self, command: dict[str, Any]) -> socket.socket | None:
        if command.get("command") != "resume" or not self._descriptors:
            return None
        return socket.socket(fileno=self._descriptors.pop(0))

    def close(self) -> None:
        """Close the socket, and descriptors that no command has taken. Idempotent."""
        self.gone = True
        while self._descriptors:
            socket.close(self._descriptors.pop())
        self._connection.close()
