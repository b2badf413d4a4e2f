"""The keeper process of a lazy restore, followed in an event loop.

lazy = KeeperProcess(started)                # of pyqmigrate.vm.incoming.lazy_keeper
lazy.attach()
await lazy.completed()                       # the guest has all of its memory
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable

from pyqmigrate.errors import QemuError
from pyqmigrate.vm.incoming.lazy_keeper import KeeperChild, StartedKeeper
from pyqmigrate.vm.incoming.lazy_state import LazyState

__all__ = ["KeeperProcess", "follow"]

_LINE_MAX = 1 << 20


class KeeperProcess:
    """A keeper that this process has started. ``state`` is the latest that it has reported."""

    def __init__(self, started: StartedKeeper) -> None:
        self._started = started
        self.state = started.state
        self._reading: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def process(self) -> KeeperChild:
        return self._started.process

    def attach(self) -> None:
        """Follow what it reports, in the running event loop."""
        if self._reading is None:
            self._started.channel.setblocking(False)
            self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        started = self._started
        with contextlib.suppress(OSError):
            await follow(started.channel, self._take, started.received)
        if not self.state.ended:
            self._take(LazyState("failed", failure="the keeper of the lazy restore has ended"))

    def _take(self, state: LazyState) -> None:
        self.state = state
        self._changed.set()

    async def changed(self) -> LazyState:
        """Wait for the next report; return it. Returns at once after the last one."""
        if not self.state.ended:
            self._changed.clear()
            await self._changed.wait()
        return self.state

    async def completed(self) -> LazyState:
        """Wait until the guest has all of its memory, and return the last report.

        Raises QemuError if QEMU ended before, or the restore failed.
        """
        while not self.state.ended:
            await self.changed()
        if self.state.state != "completed":
            raise QemuError(self.state.failure or "the lazy restore has ended")
        return self.state

    async def close(self) -> None:
        """Follow it no longer; the keeper goes on until the guest has its memory. Idempotent."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        self._started.channel.close()
        self.process.poll()  # no zombie, if it has ended

    def end(self) -> None:
        """End a keeper whose QEMU has ended. Blocks. Idempotent."""
        self._started.end()


async def follow(
    channel: socket.socket, take: Callable[[LazyState], None], received: bytes = b""
) -> None:
    """Call ``take`` with each state that comes over a non-blocking socket, until its end. ``received`` are
    bytes that were read before."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(channel, 65536):
        *lines, received = (received + data).split(b"\n")
        if len(received) > _LINE_MAX:
            return
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                take(LazyState.of(json.loads(line)))
