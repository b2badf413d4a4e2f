"""Load an instant restore's device state, up to the guest's first instruction, without an event loop.

QEMU is asked everything ahead, and answers as soon as its monitor works; the incoming stream is built in
the meantime. Then only the comparison with the snapshot is left, ``migrate-incoming`` and ``cont``. The
session is over a monitor of its own, and ends with the load: the event loop, which is imported while the
guest runs, has the other one.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pyqmigrate.errors import QemuError, QemuGone
from pyqmigrate.vm.incoming.compatibility import (
    compare_blocks,
    compare_devices,
    compare_type,
    compile_patterns,
    questions,
)
from pyqmigrate.vm.incoming.incoming_settings import (
    Incoming,
    configure,
    presets_possible,
    settings_of,
)
from pyqmigrate.vm.incoming.incoming_stream import IncomingStream
from pyqmigrate.vm.incoming.loading import LoadFailed, load_stream, settle
from pyqmigrate.vm.incoming.run_state import resumes_here, shall_resume
from pyqmigrate.vm.incoming.saved_machine import SavedMachine
from pyqmigrate.vm.qemu.blocking_monitor import BlockingMonitor
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.commands import run_blocking
from pyqmigrate.vm.qemu.spawn import END_TIMEOUT, QemuProcess

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.options import RestoreOptions
    from pyqmigrate.vm.incoming.ram_files import RamFiles
    from pyqmigrate.vm.incoming.ram_mapping import Mapped
    from pyqmigrate.vm.incoming.source import RestoreSource

__all__ = ["InstantStart", "LoadedInstant", "NotStarted", "explained"]

_PATIENCE = 0.15  # seconds for a QEMU whose guest has not run


class NotStarted(QemuError):
    """QEMU ended before its monitor answered."""


class LoadedInstant(NamedTuple):
    """A guest that was loaded into ``qemu``, which maps ``mapped``: it runs, if it shall.

    ``differences`` are notes on QEMU and the snapshot. ``start_seconds`` is the time until QEMU answered,
    ``load_seconds`` that of ``migrate-incoming``, ``version`` QEMU's. ``sealed``, ``stale_pages`` and
    ``stale_seconds`` are those of the incoming stream.
    """

    source: RestoreSource
    mapped: Mapped
    files: RamFiles
    qemu: QemuProcess
    incoming: Incoming
    version: tuple[int, int, int]
    run_state: str
    differences: tuple[str, ...]
    start_seconds: float
    load_seconds: float
    sealed: bool
    stale_pages: int
    stale_seconds: float

    def end(self) -> None:
        """End the process. Can be called again."""
        self.qemu.end()
        self.files.close()


class InstantStart:
    """One load into ``qemu``, which maps ``mapped`` from ``source`` and has ``monitor`` as a second
    monitor. All are borrowed until :meth:`run` returns."""

    def __init__(
        self,
        source: RestoreSource,
        mapped: Mapped,
        files: RamFiles,
        qemu: QemuProcess,
        monitor: socket.socket,
        saved: SavedMachine,
        options: RestoreOptions,
    ) -> None:
        self._source, self._mapped, self._files, self._qemu = source, mapped, files, qemu
        self._connection, self._saved, self._options = monitor, saved, options
        self._stream = _stream_of(source, mapped)
        self._lock = threading.RLock()  # a signal handler may interrupt another in abandon()
        self._abandoned = self._may_run = False

    def abandon(self) -> None:
        """Have :meth:`run`, in another thread, fail soon, unless the guest may have run."""
        with self._lock:
            self._abandoned = True
            if not self._may_run:
                self._stream.cancel()
                self._qemu.process.kill()

    def run(self) -> LoadedInstant:
        """Load. Blocks.

        Raises NotStarted if QEMU does not start, UsageError and BlockMismatch for another machine than
        the snapshot's, NotSupported if QEMU lacks something, SnapshotError, TargetError, QemuError with
        QEMU's own output if it does not load or resume the guest. The process has ended then.
        """
        try:
            return self._run()
        except BaseException:
            self._qemu.end(END_TIMEOUT if self._may_run else _PATIENCE)
            self._files.close()
            raise
        finally:
            self._stream.close()

    def _run(self) -> LoadedInstant:
        try:
            monitor = BlockingMonitor(self._connection)
            self._ask(monitor, self._mapped.command)
            self._stream.build()
            compile_patterns()
            monitor.negotiate()
        except QemuError as error:
            raise NotStarted(self._qemu.describe("QEMU does not start")) from error
        differences: tuple[str, ...] = ()
        try:
            differences = self._compare(monitor, self._mapped.command)
            self._files.clear()
            incoming, seconds = self._load(monitor, differences)
            state = self._settle(monitor)
        except QemuGone as error:
            died = QemuGone(self._qemu.describe("QEMU died while loading the snapshot"))
            raise explained(died, differences) from error
        assert monitor.answered_at is not None
        return LoadedInstant(
            self._source,
            self._mapped,
            self._files,
            self._qemu,
            incoming,
            monitor.version,
            state,
            differences,
            monitor.answered_at - self._qemu.started_at,
            seconds,
            self._stream.sealed,
            self._stream.stale_pages,
            self._stream.stale_seconds,
        )

    def _ask(self, monitor: BlockingMonitor, command: CommandLine) -> None:
        """Send all that is asked of QEMU: it answers when its monitor works."""
        for name, arguments in questions(command, self._saved):
            monitor.ask(name, arguments)
        if not presets_possible(command):
            monitor.ask("migrate-set-capabilities", settings_of(Incoming({}, 0)))

    def _compare(self, monitor: BlockingMonitor, command: CommandLine) -> tuple[str, ...]:
        """Compare QEMU with the snapshot, and keep the guest stopped after the load; return notes."""
        snapshot = self._source.snapshot
        run_blocking(compare_type(monitor, snapshot))
        notes = run_blocking(compare_devices(monitor, command, self._saved))
        run_blocking(compare_blocks(monitor, snapshot))
        if resumes_here(self._saved, self._options):
            run_blocking(monitor.execute("stop"))
        return tuple(notes)

    def _load(
        self, monitor: BlockingMonitor, differences: tuple[str, ...]
    ) -> tuple[Incoming, float]:
        """Have QEMU load the stream; return its settings and the seconds that took."""
        fd = self._stream.open_for_reading()
        try:
            incoming = Incoming({"incoming-stream": fd}, self._source.snapshot.offset)
            run_blocking(
                configure(monitor, incoming, presets=presets_possible(self._mapped.command))
            )
            monitor.ask("add-fd", {"opaque": "incoming-stream"}, [fd])
            fdset = run_blocking(monitor.execute("add-fd", {"opaque": "incoming-stream"}))
        finally:
            os.close(fd)
        where = f",offset={incoming.offset:#x}" if incoming.offset else ""
        uri = f"file:/dev/fdset/{fdset['fdset-id']}{where}"
        if not resumes_here(self._saved, self._options):
            self._begin_to_run()
        try:
            seconds = run_blocking(load_stream(monitor, uri))
        except LoadFailed as error:
            failed = QemuError(self._qemu.describe(str(error)))
            raise explained(failed, differences) from error
        run_blocking(monitor.execute("remove-fd", {"fdset-id": fdset["fdset-id"]}))
        return incoming, seconds

    def _settle(self, monitor: BlockingMonitor) -> str:
        """Wait for the run state, resume the guest if it shall run, and return the state."""

        def shall_run(state: str) -> bool:
            return shall_resume(state, self._saved, self._options, self._source.was_running)

        try:
            return run_blocking(settle(monitor, shall_run, self._begin_to_run))
        except LoadFailed as error:
            raise QemuError(self._qemu.describe(str(error))) from error

    def _begin_to_run(self) -> None:
        with self._lock:
            if self._abandoned:
                raise QemuError("the restore was given up")
            self._may_run = True


def _stream_of(source: RestoreSource, mapped: Mapped) -> IncomingStream:
    sealed = source.clear_pages_are_zero()
    if source.increment is None:
        return IncomingStream(source.loaded, source.fd, mapped.blocks, sealed=sealed)
    from pyqmigrate.vm.incoming.increment_stream import IncrementStream

    return IncrementStream(source.increment, mapped.blocks, sealed=sealed)


def explained(error: QemuError, differences: Sequence[str]) -> QemuError:
    """Return the error of a load, with the ``differences`` that may have caused it."""
    causes = "".join(f"\nperhaps because {note}" for note in differences)
    return type(error)(f"{error}{causes}")
