"""A lazy restore: the guest runs before its memory is there.

QEMU takes part in a post-copy migration whose source is a page server, a process of this package: pages
are sent when the guest asks for them, and the others while it does not. A keeper process
(:mod:`pyqmigrate.vm.incoming.keeper.keeper`) sees to that until the guest has all of its memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

from pyqmigrate.errors import NotSupported, QemuError, UsageError
from pyqmigrate.io.own_files import check_replaceable
from pyqmigrate.io.working_set_file import (
    WORKING_SET_FILE,
    read_current_working_set,
    working_set_path,
)
from pyqmigrate.vm.cancellation import acquired, shielded
from pyqmigrate.vm.guest.ramblock import RamLine, parse_ramblock
from pyqmigrate.vm.incoming.attempt import RestoreAttempt
from pyqmigrate.vm.incoming.lazy_checks import why_not_lazy
from pyqmigrate.vm.incoming.lazy_process import KeeperProcess, ServerSettings, start_keeper
from pyqmigrate.vm.incoming.lazy_recording import LazyRecorder
from pyqmigrate.vm.incoming.load import Incoming, configure, stream_address
from pyqmigrate.vm.incoming.options import Mode, Push
from pyqmigrate.vm.incoming.ram_files import loadable
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.run_state import RUNS
from pyqmigrate.vm.qemu.command_line import CommandLine, Option
from pyqmigrate.vm.qemu.launch import QemuSession, launch

__all__ = ["LazyAttempt"]

_PAGE = 4096
_HUGE = 2 << 20


class _Sockets(NamedTuple):
    """Both connections between the new QEMU and the keeper's processes: each side's ends."""

    monitor: socket.socket
    qemu_monitor: socket.socket
    source: socket.socket
    destination: socket.socket

    @classmethod
    def make(cls) -> _Sockets:
        return cls(*socket.socketpair(), *socket.socketpair())

    def close(self) -> None:
        for connection in self:
            connection.close()


class LazyAttempt(RestoreAttempt):
    """A restore in mode lazy."""

    async def lazily(self, command: CommandLine, why: str) -> RestoredVm:
        """Restore; ``why`` is for the report. Returns when the guest can run.

        Raises NotSupported with the reason if QEMU, the snapshot or this host cannot do it; the guest
        has not run then, and a load can be tried.
        """
        obstacle = await asyncio.to_thread(why_not_lazy, command, self.source.snapshot)
        if obstacle is not None:
            raise NotSupported(f"no lazy restore: {obstacle}")
        settings, notes = await asyncio.to_thread(self._server_settings)
        command, changes = loadable(command, self.source.snapshot)
        # QEMU ignores the snapshot's run state in post-copy: the guest is always resumed here.
        command = command.without("S").with_options(Option("S"))
        sockets = _Sockets.make()
        with contextlib.closing(sockets), await self._files(command) as files:
            async with self._keeper(settings, sockets) as keeper:
                other_guests = self._start_lookup()
                async with await self._wait_for_monitor(self._launch(command, sockets)) as qemu:
                    keeper.attach()
                    sockets.qemu_monitor.close()
                    differences = await self._compare(qemu, command)
                    await asyncio.to_thread(files.clear)
                    incoming = Incoming({}, 0, stream=sockets.destination.fileno(), lazy=True)
                    seconds = await self._take_in(qemu, incoming, keeper, sockets)
                    recorder = self._recorder(keeper, settings)
                    return await self._hand_over(
                        qemu,
                        command,
                        other_guests,
                        seconds,
                        incoming,
                        recorder,
                        keeper,
                        mode=Mode.LAZY,
                        why=why,
                        notes=(*self.notes, *differences, *changes, *files.notes, *notes),
                    )

    @contextlib.asynccontextmanager
    async def _keeper(
        self, settings: ServerSettings, sockets: _Sockets
    ) -> AsyncIterator[KeeperProcess]:
        """Start the keeper; end it, with its server, if the restore fails."""
        starting = asyncio.to_thread(
            start_keeper,
            self.source.server_target,
            self.source.kept_files,
            settings,
            sockets.monitor,
            sockets.source,
        )
        keeper = await acquired(starting, KeeperProcess.end)
        try:
            sockets.monitor.close()
            sockets.source.close()  # QEMU must notice the end of the server
            yield keeper
        except BaseException:
            await shielded(keeper.close())
            await shielded(asyncio.to_thread(keeper.end))
            raise

    async def _launch(self, command: CommandLine, sockets: _Sockets) -> QemuSession:
        options = self.options
        return await launch(
            command,
            options.pass_fds,
            qmp=options.qmp,
            stdin=options.stdin,
            stdout=options.stdout,
            stderr=options.stderr,
            second=sockets.qemu_monitor,
        )

    async def _take_in(
        self, qemu: QemuSession, incoming: Incoming, keeper: KeeperProcess, sockets: _Sockets
    ) -> float:
        """Have QEMU connect, and load the device state; return the seconds that took."""
        await configure(qemu, incoming)
        table = parse_ramblock(await qemu.monitor.hmp("info ramblock"))
        host_pages = self._host_pages(table)
        collapse = _collapsible(table) if self.options.huge_pages else []
        async with stream_address(qemu, incoming) as uri:
            started = time.monotonic()
            await qemu.monitor.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
            sockets.destination.close()
            keeper.begin(qemu.process.pid, host_pages, collapse)
            try:
                await keeper.loaded()
            except QemuError as error:
                raise QemuError(await self._failure(qemu, str(error))) from error
            return time.monotonic() - started

    async def _failure(self, qemu: QemuSession, reason: str) -> str:
        """Return why the restore failed: QEMU's own reason, or that of the page server."""
        with contextlib.suppress(QemuError):
            answer = await qemu.monitor.execute("query-migrate")
            reason = answer.get("error-desc", reason)
        return await qemu.described(f"QEMU failed to load the snapshot: {reason}")

    def _host_pages(self, table: list[RamLine]) -> dict[str, int]:
        """Return the page sizes of QEMU's memory, where they are not the usual one."""
        blocks = self.source.snapshot.blocks
        return {
            line.name: line.page_size
            for line in table
            if line.name in blocks and line.page_size > _PAGE
        }

    def _server_settings(self) -> tuple[ServerSettings, list[str]]:
        """Return how the page server shall work, and notes. Raises UsageError, TargetError."""
        options, source = self.options, self.source
        given = options.working_set
        record = working_set = None
        notes: list[str] = []
        if options.record is not None:
            if options.push is Push.NEVER:
                raise UsageError(
                    "a working set is written when the guest has all of its memory, which push never "
                    "does not send: use idle"
                )
            if given is None and source.view is not None:
                raise UsageError(
                    f"the working set of {source.name!r} cannot be written beside it: give a file "
                    "(--working-set)"
                )
            place = given if given is not None else source.place
            if place is None:
                raise UsageError(
                    "a working set is recorded beside a snapshot that is given by its path"
                )
            record = given if given is not None else working_set_path(place)
            check_replaceable(record, WORKING_SET_FILE)
        else:
            working_set = given if given is not None else self._recorded(notes)
        settings = ServerSettings(
            push=options.push,
            working_set=None if working_set is None else os.fspath(working_set),
            record=None if record is None else os.fspath(record),
            record_seconds=options.record,
            base=None if options.base is None else os.path.abspath(options.base),
            cache=None if options.cache is None else os.fspath(options.cache),
            offset=options.offset,
        )
        return settings, notes

    def _recorded(self, notes: list[str]) -> os.PathLike[str] | None:
        """Return the working set beside the snapshot, if there is one that can be used."""
        source = self.source
        if source.place is None or source.view is not None:
            return None
        path = working_set_path(source.place)
        if not os.path.lexists(path):
            return None
        try:
            read_current_working_set(path, source.identify())
        except (OSError, ValueError) as error:
            notes.append(f"the recorded working set is not used: {error}")
            return None
        return path

    def _recorder(self, keeper: KeeperProcess, settings: ServerSettings) -> LazyRecorder | None:
        if settings.record is None:
            return None
        return LazyRecorder(keeper, settings.record)

    @property
    def _resumes_here(self) -> bool:
        return True

    def _shall_run(self, state: str) -> bool:
        saved = self.saved.run_state
        if self.options.paused is None:
            runs = saved is None or saved in RUNS or self.source.was_running
            return runs and state in ("paused", "prelaunch")
        return not self.options.paused and super()._shall_run(
            state if saved is None or saved in RUNS else saved
        )


def _collapsible(table: list[RamLine]) -> list[tuple[int, int]]:
    """Return address and length of each block that can have huge pages."""
    return [
        (line.host_address, line.length)
        for line in table
        if line.page_size == _PAGE and line.length >= _HUGE and line.host_address
    ]
