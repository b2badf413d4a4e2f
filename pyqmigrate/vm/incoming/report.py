"""What comes of a restore: a guest, and a report."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from pyqmigrate.vm.incoming.options import Mode
from pyqmigrate.vm.qemu.exit import ProcessExit
from pyqmigrate.vm.qemu.launch import QemuSession
from pyqmigrate.vm.qemu.monitor import Monitor

if TYPE_CHECKING:
    from pyqmigrate.io.view import SharedView
    from pyqmigrate.vm.incoming.lazy_process import KeeperProcess
    from pyqmigrate.vm.incoming.lazy_recording import LazyRecorder
    from pyqmigrate.vm.incoming.lazy_state import LazyState
    from pyqmigrate.vm.incoming.recording import Recorder, WorkingSetReport

__all__ = ["RestoreReport", "RestoredVm"]


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did, and why. Times in seconds.

    ``load_seconds`` is from ``migrate-incoming`` to completed, ``start_seconds`` until the new
    QEMU's monitor answered, ``total_seconds`` the whole restore. ``settings`` are QEMU's that
    differ from its defaults. ``stale_pages`` are zero pages for which the file holds old bytes;
    finding them took ``stale_seconds``, during the start. ``recorded_pages`` are those of the
    recorded working set, ``prefetched_bytes`` what was requested of it until this report; the
    prefetch goes on. ``lazy`` is how far a lazy restore was. ``run_state`` is QEMU's (``running``,
    ``paused``, ``prelaunch``). ``notes`` are sentences on changes to the
    command line, and on what the user should know.
    """

    mode: Mode
    why: str
    machine: str
    qemu: str
    pid: int
    run_state: str
    load_seconds: float
    start_seconds: float
    total_seconds: float
    settings: dict[str, Any]
    mapped_blocks: tuple[str, ...] = ()
    stale_pages: int = 0
    stale_seconds: float = 0.0
    recorded_pages: int = 0
    prefetched_bytes: int = 0
    lazy: LazyState | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-compatible values."""
        settings = {name: {"value": value} for name, value in self.settings.items()}
        return asdict(self) | {"mode": str(self.mode), "settings": settings}


class RestoredVm:
    """A restored guest. ``process`` is its QEMU, ``monitor`` a session with it.

    Both belong to the caller. :meth:`close`, or leaving it as a context manager, ends only the
    session; QEMU goes on. Its process has to be waited for, as any child.
    """

    def __init__(
        self,
        qemu: QemuSession,
        report: RestoreReport,
        recorder: Recorder | LazyRecorder | None = None,
        view: SharedView | None = None,
        keeper: KeeperProcess | None = None,
    ) -> None:
        """``view`` is that of a snapshot of a store; it is closed with this object, as is the connection
        to ``keeper``."""
        self._keeper = keeper
        self._qemu = qemu
        self._recorder = recorder
        self._view = view
        self.report = report

    @property
    def runs_from_store(self) -> bool:
        """Whether the guest runs from a snapshot of a store, about which there may be messages."""
        return self._view is not None

    async def store_messages(self) -> Sequence[str]:
        """Return what went wrong with the store so far, the oldest first: a damaged pack, a store that
        does not answer. Empty for a snapshot in a file."""
        if self._view is None:
            return ()
        return await asyncio.to_thread(self._view.view.messages)

    @property
    def lazy(self) -> KeeperProcess | None:
        """How the memory of a guest in mode ``lazy`` arrives: ``state``, :meth:`~pyqmigrate.vm.incoming.\
lazy_process.KeeperProcess.changed` and ``completed``. None in other modes.

        It arrives also when this object is closed, or this process ends.
        """
        return self._keeper

    @property
    def recording(self) -> asyncio.Future[WorkingSetReport] | None:
        """The recording of the working set (option ``record``); None without it. Await it.

        Cancelling it ends the recording; the pages seen until then are written.
        """
        return None if self._recorder is None else self._recorder.result

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self._qemu.process

    @property
    def monitor(self) -> Monitor:
        return self._qemu.monitor

    async def wait(self) -> int:
        """Wait until QEMU ends; return its exit status, negative for the signal that killed it."""
        if self.process.poll() is None:
            process_exit = ProcessExit(self.process.pid)
            try:
                await process_exit.wait()
            finally:
                process_exit.close()
        return self.process.wait()

    async def end(self) -> None:
        """End QEMU whatever the guest does: by SIGTERM, then by SIGKILL."""
        await self._finish_recording()
        await self._qemu.end()
        await self._close_keeper(ended=True)
        self._close_view()

    async def close(self) -> None:
        """End the monitor session; the guest goes on. Can be called again.

        A recording ends, too; the pages seen until then are written.
        """
        await self._finish_recording()
        await self.monitor.close()
        await self._close_keeper()
        self._close_view()

    async def _close_keeper(self, ended: bool = False) -> None:
        if self._keeper is not None:
            await self._keeper.close()
            if ended:
                await asyncio.to_thread(self._keeper.end)

    def _close_view(self) -> None:
        if self._view is not None:
            self._view.close()

    async def _finish_recording(self) -> None:
        if self._recorder is not None:
            self._recorder.stop()
            await asyncio.wait([self._recorder.result])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
