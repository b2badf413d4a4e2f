"""Go on over a connection that replaces a broken one: the destination says which pages it has."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from pyqmigrate.errors import QemuError
from pyqmigrate.format.postcopy.return_path import Received, Request, Resumed, ReturnPath
from pyqmigrate.format.postcopy.stream import RESUME, ask_received

__all__ = ["resume_stream"]

_RECEIVE = 1 << 16


def resume_stream(
    connection: socket.socket, answers: ReturnPath, blocks: Sequence[str]
) -> Iterator[Received | Request]:
    """Ask which pages of the blocks have arrived, and resume; yield the answers, and requests between
    them.

    Ends when the destination goes on. Raises QemuError if it does not, ConnectionResetError, TimeoutError.
    """
    missing = set(blocks)
    for block in blocks:
        connection.sendall(ask_received(block))
    resumed = False
    while not resumed:
        data = connection.recv(_RECEIVE)
        if not data:
            raise ConnectionResetError
        for message in answers.feed(data):
            if isinstance(message, Received):
                yield message
                missing.discard(message.block)
                if not missing:
                    connection.sendall(RESUME)
            elif isinstance(message, Resumed):
                if missing or message.value != 1:
                    raise QemuError(f"the destination does not resume: {message.value}")
                resumed = True
            elif isinstance(message, Request):
                yield message
