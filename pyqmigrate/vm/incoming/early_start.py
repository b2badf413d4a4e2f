"""The part of a restore that runs before the event loop: up to the guest's first instruction.

An event loop, and a monitor for it, take Python longer to import than QEMU needs to start: they are imported
when the guest runs. So is, while QEMU starts, what loads the snapshot.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.io.target import Target
from pyqmigrate.io.threads import start_thread
from pyqmigrate.vm.incoming.command import make_incoming
from pyqmigrate.vm.incoming.compatibility import compare_command
from pyqmigrate.vm.incoming.images_in_use import refuse_in_use
from pyqmigrate.vm.incoming.listeners import refuse_taken
from pyqmigrate.vm.incoming.options import Mode, RestoreOptions
from pyqmigrate.vm.incoming.ram_files import RamFiles
from pyqmigrate.vm.incoming.ram_mapping import Mapped
from pyqmigrate.vm.incoming.restore_command import ChosenCommand, choose_command
from pyqmigrate.vm.incoming.saved_machine import read_saved_machine
from pyqmigrate.vm.incoming.source import RestoreSource, map_source
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.spawn import QemuProcess, start

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.instant_start import InstantStart, LoadedInstant
    from pyqmigrate.vm.incoming.lazy_keeper import StartedKeeper
    from pyqmigrate.vm.incoming.lazy_start import StartedLazy

__all__ = ["EarlyRestore", "StartedRestore", "prepare", "start_early", "start_mapped"]


class StartedRestore(NamedTuple):
    """A started QEMU that maps ``mapped`` from ``source``, which stays open.

    ``files`` are its other memory files. End it, or pass it on to
    :func:`pyqmigrate.vm.incoming.restore.finish_restore`.
    """

    source: RestoreSource
    mapped: Mapped
    files: RamFiles
    qemu: QemuProcess

    def end(self) -> None:
        """End the process and close its files. Can be called again."""
        self.qemu.end()
        self.files.close()


def prepare(
    command: CommandLine, options: RestoreOptions, source: RestoreSource
) -> tuple[CommandLine, RestoreOptions, tuple[str, ...]]:
    """Return the command line of a QEMU that waits for a snapshot, the options it implies, and
    notes on what was changed.

    Raises UsageError for options that contradict a restore or the snapshot, and for sockets and
    disks that another process uses.
    """
    if options.record is not None:
        _check_recording(source, options)
    if options.paused is None and command.has("S"):
        options = options._replace(paused=True)
    command, notes = make_incoming(command, paused=options.paused)
    refuse_taken(command, options.qmp)
    refuse_in_use(command)
    notes += compare_command(command, read_saved_machine(source.snapshot))
    return command, options, tuple(notes)


def _check_recording(source: RestoreSource, options: RestoreOptions) -> None:
    """Raise UsageError if no working set can be recorded."""
    if options.mode is Mode.LAZY:
        return  # checked with the other settings of its page server
    if options.mode not in (Mode.AUTO, Mode.INSTANT):
        raise UsageError(
            f"a working set is recorded in the modes instant and lazy, not in mode {options.mode}"
        )
    if source.place is None:
        raise UsageError("a working set is recorded beside a snapshot that is given by its path")
    if source.view is not None:
        if not source.records_requests:
            raise UsageError(
                "no working set is recorded: this system has no FUSE, and the snapshot is read from a "
                "copy"
            )
        source.view.view.check_recordable()
        return
    from pyqmigrate.io.working_set_file import check_working_set_place

    check_working_set_place(source.place)


def _recordable(source: RestoreSource) -> contextlib.AbstractContextManager[None]:
    """Prepare for a recording: the kernel maps what the page cache has around a touched page, and
    all of a large folio, so that the page table would show far more than was touched."""
    from pyqmigrate.io.page_cache import drop_cached
    from pyqmigrate.vm.qemu.huge_pages import without_huge_pages

    with contextlib.suppress(TargetError):
        drop_cached(source.mapped_fd)
    return without_huge_pages()


def start_mapped(
    source: RestoreSource,
    mapped: Mapped,
    options: RestoreOptions,
    second: socket.socket | None = None,
) -> StartedRestore:
    """Start the QEMU of ``mapped``, and to read a recorded working set. Not for the main thread.

    ``second`` is QEMU's end of a connection to one more monitor. Raises QemuError, UsageError, and what
    RamFiles raises.
    """
    files = RamFiles(mapped.command, source.snapshot, mapped.blocks)
    try:
        by_page_table = options.record is not None and not source.records_requests
        with _recordable(source) if by_page_table else contextlib.nullcontext():
            qemu = start(
                mapped.command,
                [source.mapped_fd, *options.pass_fds],
                qmp=options.qmp,
                stdin=options.stdin,
                stdout=options.stdout,
                stderr=options.stderr,
                second=second,
            )
    except BaseException:
        files.close()
        raise
    if options.record is None or by_page_table:  # what is pushed is not read
        source.prefetch()  # QEMU starts in the meantime
    source.fetch_rest()
    return StartedRestore(source, mapped, files, qemu)


class EarlyRestore(NamedTuple):
    """A restore that was started before there is an event loop, and what it was made from."""

    started: StartedRestore | LoadedInstant | StartedLazy
    command: CommandLine
    options: RestoreOptions
    notes: tuple[str, ...]
    chosen: ChosenCommand

    @property
    def signal_guest(self) -> Callable[[int], None] | None:
        """What sends a signal to QEMU, if its guest has been loaded and may run: it is no longer to be ended
        as if it had not."""
        from pyqmigrate.vm.incoming.instant_start import LoadedInstant

        return (
            self.started.qemu.process.send_signal
            if isinstance(self.started, LoadedInstant)
            else None
        )

    def end(self) -> None:
        """End QEMU and remove its overlays. Can be called again."""
        self.started.end()
        self.started.source.close()
        self.chosen.discard()


def start_early(
    snapshot: Target, command: Sequence[str] | None, options: RestoreOptions
) -> EarlyStart | None:
    """Start an instant or a lazy restore; arguments as for :func:`pyqmigrate.vm.restore`. Not for a
    process with threads: a lazy one forks.

    Returns None if it cannot begin, for any reason: the restore that follows meets it again and reports it,
    or loads.
    """
    keeper = _forked_keeper(snapshot) if options.mode is Mode.LAZY else None
    if options.mode is Mode.LAZY and keeper is None:
        return None
    start = EarlyStart(snapshot, command, options, keeper)
    # In a thread: a signal handler cannot raise between fork and bookkeeping.
    thread = threading.Thread(target=start.run, name="pyqmigrate-start")
    try:
        start_thread(thread)
    except TargetError:  # likewise
        return None
    return start


class EarlyStart:
    """A start in a thread of its own (:meth:`run`)."""

    def __init__(
        self,
        snapshot: Target,
        words: Sequence[str] | None,
        options: RestoreOptions,
        keeper: StartedKeeper | None,
    ) -> None:
        self._snapshot, self._words, self._options = snapshot, words, options
        self._keeper = keeper
        self._loading: InstantStart | None = None
        self._signals: list[int] = []
        self._ended = threading.Event()
        self._result: EarlyRestore | None = None
        self._failure: Exception | None = None

    def signal(self, number: int) -> None:
        """Take a signal that ends the restore: for a signal handler of the thread that calls :meth:`result`.

        QEMU is ended, soon, or has the signal if its guest may have run.
        """
        self._signals.append(number)
        if self._loading is not None:
            self._loading.abandon()
        if self._ended.is_set():
            self._pass_on(number)

    def result(self) -> EarlyRestore | None:
        """Wait for the end of the start.

        Returns None if QEMU could not be started, as :func:`start_early` does. Raises what an instant restore
        raises once QEMU has started, which has ended then; and KeyboardInterrupt after a :meth:`signal`, unless
        the guest may have run.
        """
        self._ended.wait()
        for number in self._signals:
            self._pass_on(number)
        if self._signals and not self._is_loaded:
            if self._result is not None:
                self._result.end()
            raise KeyboardInterrupt
        if self._failure is not None:
            raise self._failure
        return self._result

    @property
    def _is_loaded(self) -> bool:
        return self._result is not None and self._result.signal_guest is not None

    def _pass_on(self, number: int) -> None:
        if self._result is not None and self._result.signal_guest is not None:
            self._result.signal_guest(number)

    def run(self) -> None:
        try:
            if self._keeper is None:
                self._result = self._start()
            else:
                self._result = _start_lazy(self._snapshot, self._words, self._options, self._keeper)
        except Exception:  # the restore that follows meets it again, unless it is the failure
            return
        finally:
            self._ended.set()

    def _start(self) -> EarlyRestore:
        source = RestoreSource(
            self._snapshot,
            self._options.offset,
            self._options.base,
            self._options.cache,
            record=self._options.record is not None,
            ahead=self._options.reads_ahead,
        )
        with contextlib.ExitStack() as undo:
            undo.callback(source.close)
            chosen = choose_command(source, self._words, self._options.disks)
            undo.callback(chosen.discard)
            command, options, notes = prepare(chosen.command, self._options, source)
            mapped = map_source(command, source)
            started: StartedRestore | LoadedInstant
            if options.record is None:
                started = self._load(source, mapped, options)
            else:  # a recording has to begin before the load
                started = start_mapped(source, mapped, options)
            undo.pop_all()
            return EarlyRestore(started, command, options, (*chosen.notes, *notes), chosen)

    def _load(
        self, source: RestoreSource, mapped: Mapped, options: RestoreOptions
    ) -> LoadedInstant:
        monitor, qemu_end = socket.socketpair()
        with monitor:
            with qemu_end:  # the end of QEMU must be noticed
                started = start_mapped(source, mapped, options, qemu_end)
            with contextlib.ExitStack() as undo:
                undo.callback(started.end)
                # Imported while QEMU starts.
                from pyqmigrate.vm.incoming.instant_start import InstantStart, NotStarted

                saved = read_saved_machine(source.snapshot)
                loading = InstantStart(
                    source, mapped, started.files, started.qemu, monitor, saved, options
                )
                undo.pop_all()
            self._loading = loading
            if self._signals:
                loading.abandon()
            try:
                return loading.run()
            except NotStarted:
                raise
            except Exception as error:
                self._failure = error
                raise


def _forked_keeper(snapshot: Target) -> StartedKeeper | None:
    # Loaded only for this, and before the fork, which has it then: it imports all that an instant restore
    # does without.
    import pyqmigrate.vm.incoming.lazy_start  # noqa: F401
    from pyqmigrate.vm.incoming.forked_keeper import fork_keeper

    try:
        return fork_keeper(snapshot if isinstance(snapshot, str) else "")
    except TargetError:  # the restore that follows meets it again
        return None


def _start_lazy(
    snapshot: Target, words: Sequence[str] | None, options: RestoreOptions, keeper: StartedKeeper
) -> EarlyRestore:
    with contextlib.ExitStack() as undo:
        undo.callback(keeper.end)
        from pyqmigrate.vm.incoming.lazy_start import LazyStart

        source = RestoreSource(
            snapshot, options.offset, options.base, options.cache, pages=options.reads_pages
        )
        undo.callback(source.close)
        chosen = choose_command(source, words, options.disks)
        undo.callback(chosen.discard)
        command, options, notes = prepare(chosen.command, options, source)
        started = LazyStart(source, command, options, keeper).run()
        undo.pop_all()
        return EarlyRestore(started, command, options, (*chosen.notes, *notes), chosen)
