"""One client's socket: values in, in order, each with the descriptors that preceded it; lines out.

Reading continues only when all replies are sent, and unsent output is bounded: a client that does not
read its events is disconnected.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator

from pyqmigrate.qmp.descriptors import PendingFds, Receiver
from pyqmigrate.qmp.json_stream import JsonError, JsonStream, JsonValue, encode_line

__all__ = ["Connection"]

_log = logging.getLogger(__name__)

_CHUNK = 4 << 10  # its worst contents, a token a byte, hold the event loop up for some 5 ms
_MOST_OWED = 4 << 20
_PATIENCE = 10.0  # seconds without a byte taken by a client that is owed more than that


class Connection:
    """Owns a connected non-blocking socket, and puts arriving descriptors into ``pending``.

    ``positions`` is passed to JsonStream. For the event loop's thread only.
    """

    def __init__(
        self, sock: socket.socket, pending: PendingFds, *, positions: bool = False
    ) -> None:
        self._stream = JsonStream(positions=positions)
        self._sock = sock
        self._receiver = Receiver(sock)
        self._pending = pending
        self._loop = asyncio.get_running_loop()
        self._owed = bytearray()
        self._waiting: asyncio.Future[None] | None = None
        self._broken: OSError | None = None

    async def __aiter__(self) -> AsyncIterator[JsonValue | JsonError]:
        """Yield the client's values until it closes. Raises OSError if the socket breaks."""
        while True:
            try:
                data, fds = self._receiver.receive(_CHUNK)
            except BlockingIOError:
                await self._readable()
                continue
            self._pending.put(fds)
            if not data:
                return
            for item in self._stream.feed(data):
                yield item
                if self._broken is not None:
                    raise self._broken
            # A client that is never waited for, since more of it is always there, must not keep
            # the loop from everybody else.
            await asyncio.sleep(0)

    def send(self, message: object) -> None:
        """Send one line: as much as the client accepts now, and the rest later.

        Never blocks and never raises: errors are raised by reading and by ``sent``.
        """
        if self._broken is None:
            self._send_line(encode_line(message))

    async def send_large(self, message: object) -> None:
        """Do what ``send`` does for values that may take seconds to encode, such as a long ``id``."""
        try:
            line = await asyncio.to_thread(encode_line, message)
        except RuntimeError:  # no thread can be started: then the others have to wait for it
            line = encode_line(message)
        if self._broken is None:
            self._send_line(line)

    def _send_line(self, line: bytes) -> None:
        if self._owed:
            if len(self._owed) + len(line) > _MOST_OWED:
                self._break(OSError("it does not read what it is sent"))
            else:
                self._owed += line
            return
        sent = self._send_now(line)
        if sent < len(line) and self._broken is None:
            self._owed += line[sent:]
            self._loop.add_writer(self._sock, self._send_owed)

    async def sent(self) -> None:
        """Wait until all output is sent. Raises OSError if the socket breaks.

        A reply may be long, since it was asked for; it is not kept for a client that has stalled.
        """
        while self._owed and self._broken is None:
            owed = len(self._owed)
            self._waiting = self._loop.create_future()
            try:
                async with asyncio.timeout(_PATIENCE if owed > _MOST_OWED else None):
                    await self._waiting
            except TimeoutError:
                if len(self._owed) == owed:
                    self._break(OSError("it does not read what it is sent"))
        if self._broken is not None:
            raise self._broken

    def close(self) -> None:
        """Close the socket and the descriptors that are pending on it."""
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._receiver.close()
        self._pending.close()
        # Its traceback holds this and what was being read: a ring that only the collector finds.
        self._broken = None

    async def _readable(self) -> None:
        waiting = self._waiting = self._loop.create_future()
        self._loop.add_reader(self._sock, self._wake)
        try:
            await waiting
        finally:
            self._loop.remove_reader(self._sock)
        if self._broken is not None:
            raise self._broken

    def _send_now(self, data: bytes | bytearray) -> int:
        try:
            return self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as broken:
            self._break(broken)
            return 0

    def _send_owed(self) -> None:
        del self._owed[: self._send_now(self._owed)]
        if not self._owed:
            self._loop.remove_writer(self._sock)
            self._wake()

    def _break(self, reason: OSError) -> None:
        self._broken = reason
        self._owed.clear()
        self._loop.remove_writer(self._sock)
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
