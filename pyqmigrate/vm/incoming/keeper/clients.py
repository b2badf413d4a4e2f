"""The status socket of a keeper: other processes of the same user ask there how far a restore is."""

from __future__ import annotations

import functools
import os
import select
import socket
import struct
from collections.abc import Callable

from pyqmigrate.vm.incoming.keeper.lines import Lines
from pyqmigrate.vm.incoming.keeper.loop import Sources
from pyqmigrate.vm.incoming.keeper.state import State, status_name

__all__ = ["Clients"]

_CLIENTS_MAX = 64
_CREDENTIALS = "iII"


class Clients:
    """The listener and its clients. ``state`` returns what a new client is sent first, ``resume`` is
    called with the snapshot that a client names (``{"resume": SNAPSHOT}``)."""

    def __init__(self, state: Callable[[], State], resume: Callable[[str], None]) -> None:
        self._state, self._resume = state, resume
        self._listener: socket.socket | None = None
        self._clients: list[Lines] = []

    def listen(self, pid: int) -> None:
        """Listen for the restore of QEMU ``pid``. Raises OSError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(status_name(pid))
            listener.listen(16)
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        self._listener = listener

    def sources(self) -> Sources:
        """Return what to wait for."""
        found: Sources = {}
        if self._listener is not None:
            found[self._listener.fileno()] = (select.POLLIN, self._accept)
        for client in self._clients:
            found |= client.source(functools.partial(self._hear, client))
        return found

    def lines(self) -> list[Lines]:
        """Return the connections."""
        return list(self._clients)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        size = struct.calcsize(_CREDENTIALS)
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        _, user, _ = struct.unpack(_CREDENTIALS, data)
        if user not in (0, os.geteuid()) or len(self._clients) >= _CLIENTS_MAX:
            connection.close()
            return
        client = Lines(connection)
        self._clients.append(client)
        client.send(self._state())

    def _hear(self, client: Lines) -> None:
        for line in client.receive():
            if isinstance(line.get("resume"), str):
                self._resume(line["resume"])
        if client.closed:
            self._clients.remove(client)
            client.close()

    def close(self) -> None:
        """Close the listener. The connections stay."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
