"""Start a QEMU and connect to its monitor."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Collection
from typing import Self, Unpack

from pyqmigrate.errors import QemuError
from pyqmigrate.vm.cancellation import acquired, shielded
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.qemu.spawn import END_TIMEOUT, Connections, QemuProcess, start

__all__ = ["QemuSession", "answered", "launch"]

_START_TIMEOUT = 60.0  # seconds until QEMU answers; it may have large files to open
_PATIENCE = 0.15  # seconds for a QEMU whose guest has not run, but which may be reading a file


class QemuSession:
    """A QEMU that this process started: ``process`` and a negotiated ``monitor``.

    As a context manager, it ends QEMU when an exception is raised. ``seconds`` is how long the
    monitor took to answer. ``has_run``: whether the guest may have run; before, SIGKILL loses
    nothing.
    """

    def __init__(self, started: QemuProcess, monitor: Monitor) -> None:
        self.monitor = monitor
        self.seconds = time.monotonic() - started.started_at
        self.has_run = False
        self._started = started

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self._started.process

    async def described(self, what: str) -> str:
        """Return ``what``, how the process ended if it did, and what it wrote to stderr."""
        return await asyncio.to_thread(self._started.describe, what)

    def hand_over(self, *, bound: bool = False) -> None:
        """Let QEMU outlive this process unless ``bound``, and pass its standard error on to the
        caller's stream."""
        self.has_run = True
        self._started.hand_over(bound=bound)

    async def end(self) -> None:
        """End the process, and the guest with it, at once. Shielded from cancellation."""
        await shielded(self._stop())

    async def _stop(self) -> None:
        self._started.terminate()
        patience = END_TIMEOUT if self.has_run else _PATIENCE
        # A wrapper around QEMU may not pass the signal on.
        with contextlib.suppress(QemuError):
            await self.monitor.execute("quit", timeout=patience)
        await self.monitor.close()
        await asyncio.to_thread(self._started.wait, patience)
        await asyncio.to_thread(self._started.end, patience)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            await self.end()


async def launch(
    command: CommandLine, pass_fds: Collection[int], **connections: Unpack[Connections]
) -> QemuSession:
    """Start ``command`` with its ``connections`` and wait until its monitor answers.

    Raises QemuError with QEMU's standard error when it does not start, UsageError for invalid
    arguments.
    """
    starting = asyncio.to_thread(start, command, pass_fds, **connections)
    return await answered(await acquired(starting, QemuProcess.end))


async def answered(started: QemuProcess) -> QemuSession:
    """Wait until the monitor of a process answers; end the process if it does not.

    Raises QemuError, which is QemuGone if the process has ended by itself.
    """
    try:
        monitor = await Monitor.over(started.monitor, "of a new QEMU", timeout=_START_TIMEOUT)
    except QemuError as error:
        try:
            what = await asyncio.to_thread(started.describe, "QEMU does not start")
        finally:  # also if this task is cancelled while it waits
            await shielded(asyncio.to_thread(started.end))
        raise type(error)(what) from error
    except BaseException:
        await shielded(asyncio.to_thread(started.end))
        raise
    return QemuSession(started, monitor)
