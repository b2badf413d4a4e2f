"""Start a guest in mode lazy, up to its first instruction, without an event loop.

What the guest waits for goes on side by side: QEMU starts; the page server, which the keeper has, imports
what it needs and opens the snapshot; QEMU is asked everything ahead, and answers as soon as its monitor
works. Then only the comparison with the snapshot is left, and ``migrate-incoming``.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

from pyqmigrate.errors import NotSupported, QemuError, QemuGone
from pyqmigrate.vm.guest.ramblock import RamLine, parse_ramblock
from pyqmigrate.vm.incoming.compatibility import (
    compare_blocks,
    compare_devices,
    compare_type,
    questions,
)
from pyqmigrate.vm.incoming.incoming_settings import (
    Incoming,
    configure,
    presets_possible,
    settings_of,
)
from pyqmigrate.vm.incoming.lazy_checks import why_not_lazy
from pyqmigrate.vm.incoming.lazy_keeper import ServerSettings, StartedKeeper, start_keeper
from pyqmigrate.vm.incoming.lazy_settings import server_settings
from pyqmigrate.vm.incoming.options import RestoreOptions
from pyqmigrate.vm.incoming.ram_files import RamFiles, loadable
from pyqmigrate.vm.incoming.run_state import CONTINUABLE, RUNS
from pyqmigrate.vm.incoming.saved_machine import SavedMachine, read_saved_machine
from pyqmigrate.vm.incoming.source import RestoreSource
from pyqmigrate.vm.qemu.blocking_monitor import BlockingMonitor
from pyqmigrate.vm.qemu.command_line import CommandLine, Option
from pyqmigrate.vm.qemu.commands import run_blocking
from pyqmigrate.vm.qemu.spawn import QemuProcess, start

__all__ = ["LAZY", "LazyStart", "StartedLazy"]

LAZY = Incoming({}, 0, stream=-1, lazy=True)
_STREAM = "lazy"  # short: see BlockingMonitor
_PAGE = 4096
_HUGE = 2 << 20
_PATIENCE = 0.15  # seconds for a QEMU whose guest has not run


class StartedLazy(NamedTuple):
    """A guest whose pages arrive: it runs, if it shall. ``start_seconds`` is the time until QEMU
    answered, ``load_seconds`` that from ``migrate-incoming`` until the device state was loaded."""

    source: RestoreSource
    command: CommandLine
    qemu: QemuProcess
    keeper: StartedKeeper
    settings: ServerSettings
    notes: tuple[str, ...]
    start_seconds: float
    load_seconds: float

    def end(self) -> None:
        """End both processes. Can be called again."""
        self.qemu.end(_PATIENCE)
        self.keeper.end()


class _Sockets(NamedTuple):
    """Both connections between the new QEMU and the keeper's processes: each side's ends."""

    monitor: socket.socket
    qemu_monitor: socket.socket
    source: socket.socket
    destination: socket.socket

    @classmethod
    @contextlib.contextmanager
    def made(cls) -> Iterator[_Sockets]:
        sockets = cls(*socket.socketpair(), *socket.socketpair())
        try:
            yield sockets
        finally:
            for connection in sockets:
                connection.close()


class LazyStart:
    """One start of ``command``, which waits for a snapshot, for ``source``, which is borrowed.

    ``keeper`` is one that was started before, and is taken over.
    """

    def __init__(
        self,
        source: RestoreSource,
        command: CommandLine,
        options: RestoreOptions,
        keeper: StartedKeeper | None = None,
    ) -> None:
        self._source, self._command, self._options = source, command, options
        self._keeper = keeper
        self._qemu: QemuProcess | None = None
        self._abandoned = False

    def abandon(self) -> None:
        """Have :meth:`run`, in another thread, fail soon."""
        self._abandoned = True
        if self._qemu is not None:
            self._qemu.process.kill()
        if self._keeper is not None:
            self._keeper.abandon()

    def run(self) -> StartedLazy:
        """Start it. Blocks; not for the main thread.

        Raises NotSupported with the reason if QEMU, the snapshot or this host cannot do it, UsageError
        and BlockMismatch for another machine than the snapshot's, QemuError with QEMU's own output if it
        does not start or load. The guest has not run then, and both processes have ended.
        """
        with contextlib.ExitStack() as on_failure:
            if self._keeper is not None:
                on_failure.callback(self._keeper.end)
            obstacle = why_not_lazy(self._command, self._source.snapshot)
            if obstacle is not None:
                raise NotSupported(f"no lazy restore: {obstacle}")
            settings, notes = server_settings(self._options, self._source)
            command, changes = loadable(self._command, self._source.snapshot)
            saved = read_saved_machine(self._source.snapshot)
            # QEMU ignores the snapshot's run state in post-copy: it is chosen here.
            command = command.without("S")
            if not shall_run(self._source, saved, self._options.paused):
                command = command.with_options(Option("S"))
            with RamFiles(command, self._source.snapshot) as files, _Sockets.made() as sockets:
                keeper = self._set_up_keeper(settings, sockets, on_failure)
                qemu = self._start_qemu(command, sockets)
                on_failure.callback(qemu.end, _PATIENCE)
                sockets.qemu_monitor.close()  # the end of QEMU must be noticed
                self._check_abandoned()
                try:
                    monitor = BlockingMonitor(sockets.monitor)
                    self._ask(monitor, command, saved, sockets)
                    sockets.destination.close()
                    monitor.negotiate()
                except QemuError as error:
                    raise QemuError(qemu.describe("QEMU does not start")) from error
                try:
                    differences, table = self._compare(monitor, command, saved)
                    run_blocking(configure(monitor, LAZY, presets=presets_possible(command)))
                    files.clear()
                    seconds = self._load(qemu, monitor, keeper, table)
                except QemuGone as error:
                    raise QemuGone(qemu.describe("QEMU died while loading the snapshot")) from error
                keeper.leave_monitor()
            assert monitor.answered_at is not None
            on_failure.pop_all()
            return StartedLazy(
                self._source,
                command,
                qemu,
                keeper,
                settings,
                (*differences, *changes, *files.notes, *notes),
                monitor.answered_at - qemu.started_at,
                seconds,
            )

    def _check_abandoned(self) -> None:
        if self._abandoned:
            raise QemuError("the restore was given up")

    def _set_up_keeper(
        self, settings: ServerSettings, sockets: _Sockets, on_failure: contextlib.ExitStack
    ) -> StartedKeeper:
        keeper = self._keeper
        if keeper is None:
            keeper = self._keeper = start_keeper(self._source.name)
            on_failure.callback(keeper.end)
        self._check_abandoned()
        source = self._source
        keeper.set_up(
            source.server_target, source.kept_files, settings, sockets.monitor, sockets.source
        )
        sockets.source.close()  # QEMU must notice the end of the server
        return keeper

    def _start_qemu(self, command: CommandLine, sockets: _Sockets) -> QemuProcess:
        options = self._options
        self._qemu = start(command, options.pass_fds, **options.connections(sockets.qemu_monitor))
        return self._qemu

    def _ask(
        self, monitor: BlockingMonitor, command: CommandLine, saved: SavedMachine, sockets: _Sockets
    ) -> None:
        """Send all that is asked of QEMU: it answers when its monitor works."""
        for name, arguments in questions(command, saved):
            monitor.ask(name, arguments)
        if not presets_possible(command):
            monitor.ask("migrate-set-capabilities", settings_of(LAZY))
        monitor.ask("getfd", {"fdname": _STREAM}, [sockets.destination.fileno()])

    def _compare(
        self, monitor: BlockingMonitor, command: CommandLine, saved: SavedMachine
    ) -> tuple[list[str], list[RamLine]]:
        """Compare QEMU with the snapshot; return notes, and QEMU's blocks."""
        snapshot = self._source.snapshot
        run_blocking(compare_type(monitor, snapshot))
        notes = run_blocking(compare_devices(monitor, command, saved))
        run_blocking(compare_blocks(monitor, snapshot))
        return notes, parse_ramblock(run_blocking(monitor.hmp("info ramblock")))

    def _load(
        self,
        qemu: QemuProcess,
        monitor: BlockingMonitor,
        keeper: StartedKeeper,
        table: list[RamLine],
    ) -> float:
        """Have QEMU load the device state; the guest may run then. Return the seconds that took."""
        run_blocking(monitor.execute("getfd", {"fdname": _STREAM}))
        blocks = self._source.snapshot.blocks
        host_pages = {
            line.name: line.page_size
            for line in table
            if line.name in blocks and line.page_size > _PAGE
        }
        started = time.monotonic()
        collapse = _collapsible(table) if self._options.huge_pages else []
        keeper.begin(qemu.process.pid, [line.name for line in table], host_pages, collapse)
        uri = {"uri": f"fd:{_STREAM}", "exit-on-error": False}
        try:
            run_blocking(monitor.execute("migrate-incoming", uri))
            keeper.wait_until_loaded()
        except QemuGone:
            raise
        except QemuError as error:
            raise QemuError(_failure(qemu, monitor, str(error))) from error
        return time.monotonic() - started


def shall_run(source: RestoreSource, saved: SavedMachine, paused: bool | None) -> bool:
    """Return whether the guest shall run, by what was asked for and its state when it was saved."""
    state = saved.run_state
    if paused is None:
        return state is None or state in RUNS or source.was_running
    return not paused and (state is None or state in (*RUNS, *CONTINUABLE))


def _failure(qemu: QemuProcess, monitor: BlockingMonitor, reason: str) -> str:
    """Return why the restore failed: QEMU's own reason, or that of the page server."""
    with contextlib.suppress(QemuError):
        answer = run_blocking(monitor.execute("query-migrate"))
        reason = answer.get("error-desc", reason)
    return qemu.describe(f"QEMU failed to load the snapshot: {reason}")


def _collapsible(table: list[RamLine]) -> list[tuple[int, int]]:
    """Return address and length of each block that can have huge pages."""
    return [
        (line.host_address, line.length)
        for line in table
        if line.page_size == _PAGE and line.length >= _HUGE and line.host_address
    ]
