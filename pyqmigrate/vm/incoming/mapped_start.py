"""Check a restore, and start a QEMU whose memory is mapped from the snapshot."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import NamedTuple

from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.vm.incoming.command import make_incoming
from pyqmigrate.vm.incoming.compatibility import compare_command
from pyqmigrate.vm.incoming.images_in_use import refuse_in_use
from pyqmigrate.vm.incoming.listeners import refuse_taken
from pyqmigrate.vm.incoming.options import Mode, RestoreOptions
from pyqmigrate.vm.incoming.ram_files import RamFiles
from pyqmigrate.vm.incoming.ram_mapping import Mapped
from pyqmigrate.vm.incoming.saved_machine import read_saved_machine
from pyqmigrate.vm.incoming.source import RestoreSource
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.spawn import QemuProcess, start

__all__ = ["StartedRestore", "prepare", "start_mapped", "start_mapped_with"]


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

    def start_it() -> QemuProcess:
        return start(
            mapped.command, [source.mapped_fd, *options.pass_fds], **options.connections(second)
        )

    return start_mapped_with(start_it, source, mapped, options)


def start_mapped_with(
    start_it: Callable[[], QemuProcess],
    source: RestoreSource,
    mapped: Mapped,
    options: RestoreOptions,
) -> StartedRestore:
    """As :func:`start_mapped`, with a function that starts QEMU, or lets a waiting one go on."""
    files = RamFiles(mapped.command, source.snapshot, mapped.blocks)
    with contextlib.ExitStack() as undo:
        undo.callback(files.close)
        by_page_table = options.record is not None and not source.records_requests
        with _recordable(source) if by_page_table else contextlib.nullcontext():
            qemu = start_it()
        undo.callback(qemu.end)
        if options.record is None or by_page_table:  # what is pushed is not read
            source.prefetch()  # QEMU starts in the meantime
        source.fetch_rest()
        undo.pop_all()
    return StartedRestore(source, mapped, files, qemu)
