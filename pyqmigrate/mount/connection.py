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

from pyqmigrate.mount.protocol import encode_notify_store, encode_reply

__all__ = ["DeviceConnection", "KeeperConnection", "reply_to_kernel"]

_AGAIN = (errno.EINTR, errno.ENOENT, errno.EAGAIN)  # of a read; ENOENT: the reader was interrupted
_UNWANTED = (errno.ENOENT, errno.EINTR)  # of a reply: nobody waits for it any more
_GONE = (errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED)

Body = bytes | bytearray | memoryview


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

    def reply(self, unique: int, body: Body, error: int) -> None:
        reply_to_kernel(self._fd, unique, body, error)

    def store(self, node: int, offset: int, data: Body) -> bool:
        """Put ``data`` into the page cache of a node. Return False if the kernel does not know it,
        or has no memory for that."""
        try:
            os.writev(self._fd, [encode_notify_store(node, offset, len(data)), data])
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

    def reply(self, unique: int, body: Body, error: int) -> None:
        super().reply(unique, body, error)
        self._requests.send(unique.to_bytes(8, "little"))


def reply_to_kernel(fd: int, unique: int, body: Body = b"", error: int = 0) -> None:
    """Answer a request. If nobody waits for the answer any more, nothing happens."""
    if error:
        body = b""
    try:
        os.writev(fd, [encode_reply(unique, len(body), error), body])
    except OSError as failure:
        if failure.errno not in (*_UNWANTED, *_GONE):
            raise
