"""Requests that the keeper passes on and remembers, for kernels that cannot send them again.

The keeper reads a request from the kernel, sends it to the worker and forgets it when the worker says
that it was answered. A new worker gets everything that is remembered. A request that was answered just
before the worker died is answered twice; the kernel ignores the second answer.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque
from typing import NamedTuple

from pyqmigrate.mount import protocol
from pyqmigrate.mount.protocol import BadRequest, Request

__all__ = ["RememberedRequest", "RememberedRequests"]

_BURST = 64  # requests that are read before the keeper looks at anything else
_INTERRUPT = 1  # this bit makes the number of an INTERRUPT of that of its request


class RememberedRequest(NamedTuple):
    """A request that has no answer, and since when (ns, monotonic)."""

    request: Request
    message: bytes
    since_ns: int


class RememberedRequests:
    """``fd`` is that of /dev/fuse, which must not block. Used by one thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray(protocol.REQUEST_MAX)
        self._requests: dict[int, RememberedRequest] = {}  # by number, the oldest first
        self._unsent: deque[bytes] = deque()
        self._worker: socket.socket | None = None

    def waiting(self) -> list[RememberedRequest]:
        """Return what has no answer, the oldest first."""
        return [
            remembered
            for remembered in self._requests.values()
            if remembered.request.operation != protocol.INTERRUPT
        ]

    @property
    def has_unsent(self) -> bool:
        """Whether requests wait until the worker has room for them."""
        return bool(self._unsent)

    def connect(self, worker: socket.socket) -> None:
        """Send everything that is remembered to a new worker; the socket must not block."""
        self._worker = worker
        self._unsent = deque(remembered.message for remembered in self._requests.values())
        self.send()

    def disconnect(self) -> None:
        """Forget the worker: it is dead. What it said before is still read."""
        self.take_answers()
        self._worker = None
        self._unsent.clear()

    def take_requests(self) -> None:
        """Read requests from the kernel, and pass them on. Raises OSError (ENODEV) at the end."""
        for _ in range(_BURST):
            try:
                length = os.readv(self._fd, [self._buffer])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                if error.errno == errno.EAGAIN:
                    break
                raise
            self._take(bytes(memoryview(self._buffer)[:length]))
        self.send()

    def take_answers(self) -> None:
        """Forget what the worker has answered."""
        while self._worker is not None:
            try:
                message = self._worker.recv(8)
            except (BlockingIOError, ConnectionError):
                return
            if not message:
                return
            unique = int.from_bytes(message, "little")
            self._requests.pop(unique, None)
            self._requests.pop(unique | _INTERRUPT, None)

    def send(self) -> None:
        """Send to the worker what it has room for."""
        while self._unsent and self._worker is not None:
            try:
                self._worker.send(self._unsent[0])
            except (BlockingIOError, ConnectionError):
                return  # what a dead worker does not take goes to the next one
            self._unsent.popleft()

    def _take(self, message: bytes) -> None:
        try:
            request = Request.decode(message, len(message))
        except BadRequest:
            return
        if request.operation in (protocol.FORGET, protocol.BATCH_FORGET):
            return  # they have no answer, and change nothing
        remembered = RememberedRequest(request, message, time.monotonic_ns())
        self._requests[request.unique] = remembered
        self._unsent.append(message)
