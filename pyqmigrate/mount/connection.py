"""A worker's connection to the kernel: the descriptor of /dev/fuse, and, where the kernel cannot send
requests again, the keeper in front of it.

Since Linux 6.9 (HAS_RESEND) a worker reads requests itself, and the kernel sends those without an
answer to the next worker. Before, a request that a dead worker had read would be lost, and its reader
would wait for ever. There the keeper reads the requests, passes them on, and remembers each until the
worker says that it is answered (:mod:`pyqmigrate.mount.remembered`). Replies go to the kernel directly in both cases.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence

from pyqmigrate.mount.protocol import encode_notify_store, encode_reply

__all__ = ["DeviceConnection", "KeeperConnection", "reply_to_kernel"]

_AGAIN = (errno.EINTR, errno.ENOENT, errno.EAGAIN)  # of a read; ENOENT: the reader was interrupted
_UNWANTED = (errno.ENOENT, errno.EINTR)  # of a reply: nobody waits for it any more
_PARTS_MAX = 1000  # the kernel takes 1024
_GONE = (errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED)

Body = bytes | bytearray | memoryview


def _few(parts: Sequence[Body]) -> Sequence[Body]:
    """Return parts that one system call takes."""
    return parts if len(parts) <= _PARTS_MAX else (b"".join(parts),)


class DeviceConnection:
    """Requests are read from the kernel. A :class:`~pyqmigrate.mount.server.Connection`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def receive(self, buffer: bytearray) -> int | None:
        while True:
            try:
                return os.readv(self._fd, [buffer])
            except OSError as error:
                if error.errno in _GONE:
                    return None
                if error.errno not in _AGAIN:
                    raise

    def reply(self, unique: int, body: Sequence[Body], error: int) -> None:
        reply_to_kernel(self._fd, unique, body, error)

    def store(self, node: int, offset: int, data: Sequence[Body]) -> bool:
        """Put ``data``, in parts, into the page cache of a node. Return False if the kernel does not
        know it, or has no memory for that."""
        data = _few(data)
        header = encode_notify_store(node, offset, sum(map(len, data)))
        try:
            os.writev(self._fd, [header, *data])
        except OSError as error:
            if error.errno in (*_UNWANTED, *_GONE, errno.ENOMEM, errno.EINVAL):
                return False
            raise
        return True


class KeeperConnection(DeviceConnection):
    """Requests come from the keeper, which gets the number of each that was answered."""

    def __init__(self, fd: int, requests: socket.socket) -> None:
        super().__init__(fd)
        self._requests = requests

    def receive(self, buffer: bytearray) -> int | None:
        try:
            return self._requests.recv_into(buffer) or None
        except OSError as error:
            if error.errno == errno.ECONNRESET:
                return None
            raise

    def reply(self, unique: int, body: Sequence[Body], error: int) -> None:
        super().reply(unique, body, error)
        self._requests.send(unique.to_bytes(8, "little"))


def reply_to_kernel(fd: int, unique: int, body: Sequence[Body] = (), error: int = 0) -> None:
    """Answer a request, with a body in parts. If nobody waits for the answer any more, nothing
    happens."""
    body = () if error else _few(body)
    try:
        os.writev(fd, [encode_reply(unique, sum(map(len, body)), error), *body])
    except OSError as failure:
        if failure.errno not in (*_UNWANTED, *_GONE):
            raise
