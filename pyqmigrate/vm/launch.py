"""A QEMU of our own: its process, and its monitor once that answers."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Collection
from typing import Self

from pyqmigrate.errors import QemuError
from pyqmigrate.vm.command_line import CommandLine
from pyqmigrate.vm.connection import Monitor
from pyqmigrate.vm.starting import END_TIMEOUT, Started, Stream, start
from pyqmigrate.vm.unbroken import owned, unbroken

__all__ = ["Launched", "answered", "launch"]

_START_TIMEOUT = 60.0  # seconds until QEMU answers; it may have large files to open


class Launched:
    """A QEMU of our own: ``process`` and a negotiated ``monitor``, which answered after
    ``seconds``. As a context manager, it is ended when something is raised."""

    def __init__(self, started: Started, monitor: Monitor) -> None:
        self.monitor = monitor
        self.seconds = time.monotonic() - started.at
        self._started = started

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self._started.process

    async def described(self, what: str) -> str:
        """``what``, how the process ended if it did, and what it wrote to standard error."""
        return await asyncio.to_thread(self._started.describe, what)

    def hand_over(self) -> None:
        """From here on QEMU lives without us, and standard error goes where the caller wanted."""
        self._started.hand_over()

    async def end(self) -> None:
        """Ask the process to end, and end it if it does not. Cannot be interrupted halfway."""
        await unbroken(self._stop())

    async def _stop(self) -> None:
        with contextlib.suppress(QemuError):
            await self.monitor.execute("quit", timeout=END_TIMEOUT)
        await self.monitor.close()
        await asyncio.to_thread(self._started.wait, END_TIMEOUT)
        await asyncio.to_thread(self._started.end)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            await self.end()


async def launch(
    command: CommandLine, pass_fds: Collection[int], *,
    stdin: Stream = None, stdout: Stream = None, stderr: Stream = None,
) -> Launched:
    """Start ``command`` and wait until its monitor answers.

    Streams are as subprocess.Popen takes them; None is this process's own. Raises QemuError with
    what QEMU said when it does not start, UsageError for words that no program can be given.
    """
    starting = asyncio.to_thread(
        start, command, pass_fds, stdin=stdin, stdout=stdout, stderr=stderr
    )
    return await answered(await owned(starting, Started.end))


async def answered(started: Started) -> Launched:
    """Wait until the monitor of a process answers; the process is ended when it does not."""
    try:
        monitor = await Monitor.connect(started.monitor_path, timeout=_START_TIMEOUT)
        started.forget_socket()
    except QemuError as error:
        what = await asyncio.to_thread(started.describe, "QEMU does not start")
        await unbroken(asyncio.to_thread(started.end))
        raise QemuError(what) from error
    except BaseException:
        await unbroken(asyncio.to_thread(started.end))
        raise
    return Launched(started, monitor)
