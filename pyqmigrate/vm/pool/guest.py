"""A guest of a pool: paused before its first instruction, until it is handed over."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from pyqmigrate.errors import NotSupported, QemuError, UsageError
from pyqmigrate.io.socket_path import remove_stale_socket
from pyqmigrate.vm.cancellation import shielded
from pyqmigrate.vm.incoming.listeners import Listener, listeners
from pyqmigrate.vm.incoming.report import RestoredVm, RestoreReport
from pyqmigrate.vm.incoming.restore_command import ChosenCommand
from pyqmigrate.vm.qemu.exit import ProcessExit
from pyqmigrate.vm.qemu.monitor import Monitor

__all__ = ["PooledGuest"]

_PATIENCE = 1.0  # seconds for QEMU to answer ``quit``, and to end, until SIGKILL


class PooledGuest:
    """Guest ``number`` of a pool; ``qmp`` is its monitor socket, ``run_state`` as it was handed over.

    It ends with its pool. :meth:`end`, or leaving it as a context manager, ends it earlier. Once its
    QEMU has ended, for whatever reason, its sockets and overlays are removed.
    """

    def __init__(
        self,
        number: int,
        qmp: Path,
        vm: RestoredVm,
        chosen: ChosenCommand,
        on_end: Callable[[PooledGuest], None],
    ) -> None:
        """Watch ``vm``, which belongs to this object; ``on_end`` is called once it has ended.

        Raises NotSupported on a kernel without pidfds.
        """
        self.number = number
        self.qmp = qmp
        self.run_state = vm.report.run_state
        self.vm = vm
        self._chosen = chosen
        self._on_end = on_end
        self._exit = ProcessExit(vm.process.pid)
        if not self._exit.known:
            raise NotSupported("a pool needs a kernel with pidfds (Linux 5.3)")
        self._exited = asyncio.Event()
        self._ending: asyncio.Future[None] | None = None
        self._watching = asyncio.create_task(self._watch())

    def __repr__(self) -> str:
        return f"<PooledGuest {self.number}, pid {self.pid}>"

    @property
    def pid(self) -> int:
        return self.vm.process.pid

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.vm.process

    @property
    def monitor(self) -> Monitor:
        """A session with QEMU, in addition to the socket ``qmp``."""
        return self.vm.monitor

    @property
    def report(self) -> RestoreReport:
        return self.vm.report

    @property
    def has_ended(self) -> bool:
        """Whether QEMU has ended, or is being ended."""
        return self._ending is not None or self.vm.process.poll() is not None

    @property
    def listeners(self) -> Sequence[Listener]:
        """The sockets of the command line at which this guest listens."""
        return tuple(listeners(self._chosen.command))

    async def run(self) -> None:
        """Let the guest run. Raises QemuError if QEMU cannot resume it."""
        await self.monitor.execute("cont")
        self.run_state = "running"

    async def wait(self) -> int:
        """Wait until QEMU ends; return its exit status, negative for the signal that killed it."""
        await self._exited.wait()
        return self.vm.process.wait()

    async def end(self) -> None:
        """End QEMU and remove its sockets and overlays. Can be called again; a cancellation takes
        effect when that is done."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        await shielded(self._ending)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def _watch(self) -> None:
        try:
            await self._exit.wait()
            self._exited.set()
        finally:
            self._exit.close()
        await self.end()

    async def _end(self) -> None:
        try:
            await self._end_process()
            await self.vm.end()
            await asyncio.to_thread(self._remove_files)
        finally:
            self._on_end(self)

    async def _end_process(self) -> None:
        """End it by ``quit``, on which QEMU removes what it has made, or by SIGKILL."""
        with contextlib.suppress(QemuError, TimeoutError):
            if not self._exited.is_set():
                await self.monitor.execute("quit", timeout=_PATIENCE)
                async with asyncio.timeout(_PATIENCE):
                    await self._exited.wait()
        if not self._exited.is_set():
            self._exit.kill()
            await self._exited.wait()

    def _remove_files(self) -> None:
        """Remove what QEMU leaves behind if it was killed."""
        for listener in self.listeners:
            if listener.path:
                with contextlib.suppress(OSError, UsageError):
                    remove_stale_socket(Path(listener.path))
        self._chosen.discard()
