"""A lazy restore: the guest runs before its memory is there.

QEMU takes part in a post-copy migration whose source is a page server, a process of this package: pages
are sent when the guest asks for them, and the others while it does not. A keeper process
(:mod:`pyqmigrate.vm.incoming.keeper.keeper`) sees to that until the guest has all of its memory.
"""

from __future__ import annotations

import asyncio
import contextlib

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.io.working_set_file import IN_STORE
from pyqmigrate.vm.cancellation import shielded
from pyqmigrate.vm.incoming.attempt import RestoreAttempt
from pyqmigrate.vm.incoming.lazy_process import KeeperProcess
from pyqmigrate.vm.incoming.lazy_recording import LazyRecorder
from pyqmigrate.vm.incoming.lazy_start import LAZY, LazyStart, StartedLazy
from pyqmigrate.vm.incoming.options import Mode
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.launch import answered

__all__ = ["LazyAttempt"]


class LazyAttempt(RestoreAttempt):
    """A restore in mode lazy."""

    async def lazily(self, command: CommandLine, why: str) -> RestoredVm:
        """Restore; ``why`` is for the report. Returns when the guest can run.

        Raises NotSupported with the reason if QEMU, the snapshot or this host cannot do it; the guest
        has not run then, and a load can be tried.
        """
        start = LazyStart(self.source, command, self.options)
        starting = asyncio.ensure_future(asyncio.to_thread(start.run))
        try:
            started = await asyncio.shield(starting)
        except asyncio.CancelledError:
            start.abandon()
            with contextlib.suppress(PyqmigrateError):
                started = await shielded(starting)
                await shielded(asyncio.to_thread(started.end))
            raise
        return await self.finish(started, why)

    async def finish(self, started: StartedLazy, why: str = "asked for") -> RestoredVm:
        """Connect to a guest that runs, and report; after an error it is ended."""
        keeper = KeeperProcess(started.keeper)
        keeper.attach()
        try:
            other_guests = self._start_lookup()
            async with await self._wait_for_monitor(answered(started.qemu)) as qemu:
                qemu.seconds = started.start_seconds
                qemu.has_run = True
                recorder = self._recorder(keeper, started.settings.record)
                return await self._hand_over(
                    qemu,
                    started.command,
                    other_guests,
                    started.load_seconds,
                    LAZY,
                    recorder,
                    keeper,
                    mode=Mode.LAZY,
                    why=why,
                    notes=(*self.notes, *started.notes),
                )
        except BaseException:
            await shielded(keeper.close())
            await shielded(asyncio.to_thread(keeper.end))
            raise

    def _recorder(self, keeper: KeeperProcess, record: str | None) -> LazyRecorder | None:
        if record != IN_STORE:
            return None if record is None else LazyRecorder(keeper, record)
        view = self.source.view
        assert view is not None
        return LazyRecorder(keeper, view.view.check_recordable(), self.source.server_target)

    def _shall_run(self, state: str) -> bool:
        return False  # it was started so that it runs as soon as it is loaded, or stays paused
