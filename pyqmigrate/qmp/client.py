"""A small QMP client that blocks: one command, one reply, over a UNIX socket.

    with QmpClient.connect("/run/guest.qmp") as client:
        print(client.greeting["version"], client.execute("query-status"))

It needs the standard library only. :class:`pyqmigrate.vm.Monitor` is the client for asyncio.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Mapping
from typing import Any, Self

from pyqmigrate.errors import QemuRefused

__all__ = ["QmpClient"]

_RECEIVED_AT_ONCE = 1 << 16  # bytes


class QmpClient:
    """A negotiated session without out-of-band execution, over a connected socket.

    The session owns the socket. ``timeout`` is in seconds, for each reply. ``greeting`` is the
    server's, ``events`` collects the events that arrive while a reply is awaited.

    Every method raises ConnectionError if the server hangs up, TimeoutError if no reply comes in
    time, and ValueError if the server sends something that is not QMP.
    """

    def __init__(self, connection: socket.socket, timeout: float = 30.0) -> None:
        self.events: list[dict[str, Any]] = []
        self._received = b""
        self._ids = itertools.count(1)
        self._socket = connection
        try:
            connection.settimeout(timeout)
            while "event" in (message := self._next_message()):  # QEMU may send one first
                self.events.append(message)
            if "QMP" not in message:
                raise ValueError(f"the server's greeting is not QMP: {message}")
            self.greeting: dict[str, Any] = message["QMP"]
            self.execute("qmp_capabilities")
        except BaseException:
            connection.close()
            raise

    @classmethod
    def connect(cls, path: str | os.PathLike[str], timeout: float = 30.0) -> Self:
        """Connect to the monitor at ``path``. Raises OSError if that fails."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(os.fspath(path))
        except BaseException:
            connection.close()
            raise
        return cls(connection, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, fd: int | None = None
    ) -> Any:
        """Run a command and return its result.

        ``fd`` is sent along; the caller keeps it. The server takes one descriptor from a message,
        so nothing else is sent before the reply
        (docs/internals/qemu-management.md, "Passing descriptors").

        Raises QemuRefused for an error reply.
        """
        request_id = next(self._ids)
        request: dict[str, Any] = {"execute": command, "id": request_id}
        if arguments is not None:
            request["arguments"] = arguments
        text = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._socket, [text], [] if fd is None else [fd])
        if sent < len(text):
            self._socket.sendall(text[sent:])
        while True:
            message = self._next_message()
            if "event" in message:
                self.events.append(message)
            elif message.get("id") == request_id:
                if "error" in message:
                    error = message["error"]
                    raise QemuRefused(command, error["desc"], error["class"])
                return message["return"]

    def _next_message(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            data = self._socket.recv(_RECEIVED_AT_ONCE)
            if not data:
                raise ConnectionError("the QMP server hung up")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"a QMP message is not an object: {line[:80]!r}")
        return message
