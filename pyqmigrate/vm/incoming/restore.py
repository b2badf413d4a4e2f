"""A new QEMU that goes on where a snapshot was taken.

    guest = await restore("/snap/guest.mapped", ["qemu-system-x86_64", "-M", "q35", "-m", "4G"])
    print(guest.report.mode, guest.report.load_seconds)
    await guest.wait()

The modes:

- ``instant``: QEMU's RAM is a private mapping of the snapshot, and QEMU loads only a small incoming
  stream. The time does not depend on the size of the guest.
- ``lazy``: the guest runs at once, too, whatever its memory is: a page server sends the pages over
  a post-copy migration, those that the guest asks for first.
- ``load``: QEMU reads the whole file before the guest runs.
- ``postcopy``: QEMU's own lazy load, if it has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterator, Sequence
from typing import TYPE_CHECKING, Unpack

from pyqmigrate.errors import NotSupported
from pyqmigrate.io.target import Target
from pyqmigrate.vm.cancellation import acquired
from pyqmigrate.vm.incoming.attempt import RestoreAttempt
from pyqmigrate.vm.incoming.early_restore import EarlyRestore
from pyqmigrate.vm.incoming.incoming_streams import IncomingStreams
from pyqmigrate.vm.incoming.instant_start import LoadedInstant
from pyqmigrate.vm.incoming.mapped_start import StartedRestore, prepare, start_mapped
from pyqmigrate.vm.incoming.options import Mode, RestoreOptions
from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore_command import ChosenCommand, choose_command
from pyqmigrate.vm.incoming.source import map_source

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.keywords import VmRestoreOptions

__all__ = ["finish_restore", "restore", "restore_checked", "restore_from"]


async def restore(
    snapshot: Target, command: Sequence[str] | None = None, **options: Unpack[VmRestoreOptions]
) -> RestoredVm:
    """Start a QEMU that goes on where ``snapshot`` was taken.

    command: the command line that the VM was started with, the program first. What a restore needs
        is added; what conflicts with one is left out and named in the report's notes, or refused.
        None is the recorded command line (:mod:`pyqmigrate.vm.record.contents`); a given one is
        compared with the record, if there is one. A fixed ``guid`` of ``vmgenid`` is replaced by a
        new one.

    The options are those of :class:`~pyqmigrate.vm.VmRestoreOptions`.

    Raises UsageError for a command line that contradicts a restore, for another machine type, fewer
    processors or missing devices, and for sockets and disks that another process uses;
    BlockMismatch for other RAM blocks, SnapshotError for a bad file, NotSupported if this QEMU or
    this file cannot do ``mode``, QemuError with QEMU's own output if it does not start or load.
    After an error the started QEMU is ended.
    """
    return await restore_checked(snapshot, command, RestoreOptions.check(options))


async def restore_checked(
    snapshot: Target, command: Sequence[str] | None, options: RestoreOptions
) -> RestoredVm:
    """As :func:`restore`, with checked options."""
    streams = await IncomingStreams.open(
        snapshot,
        options.offset,
        options.base,
        options.cache,
        record=options.record is not None,
        ahead=options.reads_ahead,
        pages=options.reads_pages,
    )
    return await _closing(streams, _restore(streams, command, options))


async def _restore(
    streams: IncomingStreams, words: Sequence[str] | None, options: RestoreOptions
) -> RestoredVm:
    choosing = asyncio.to_thread(choose_command, streams.source, words, options.disks)
    chosen = await acquired(choosing, ChosenCommand.discard)
    return await restore_from(streams, chosen, options)


async def finish_restore(early: EarlyRestore) -> RestoredVm:
    """Finish what :func:`pyqmigrate.vm.incoming.early_start.start_early` started; after an error it
    is ended."""
    started = early.started
    streams = IncomingStreams(started.source)
    arguments = (streams, early.options, started.qemu.started_at, early.notes)
    with _discarding(early.chosen):
        if isinstance(started, StartedRestore):
            attempt = RestoreAttempt(*arguments)
            return await _closing(streams, attempt.instant_or_load(started, early.command))
        if isinstance(started, LoadedInstant):
            return await _closing(streams, RestoreAttempt(*arguments).finish_instant(started))
        from pyqmigrate.vm.incoming.lazy import LazyAttempt

        return await _closing(streams, LazyAttempt(*arguments).finish(started))


async def _closing(streams: IncomingStreams, work: Awaitable[RestoredVm]) -> RestoredVm:
    """Return the result of ``work`` and close the streams. If that is cancelled the QEMU is ended:
    the caller does not get it."""
    vm: RestoredVm | None = None
    try:
        async with streams:
            vm = await work
    except BaseException:
        streams.source.cancel_prefetch()
        if vm is not None:
            await vm.end()
        raise
    return vm


@contextlib.contextmanager
def _discarding(chosen: ChosenCommand) -> Iterator[None]:
    """Remove the overlays that were made, after an error."""
    try:
        yield
    except BaseException:
        chosen.discard()
        raise


async def restore_from(
    streams: IncomingStreams, chosen: ChosenCommand, options: RestoreOptions
) -> RestoredVm:
    """As :func:`restore`, from an open snapshot."""
    with _discarding(chosen):
        return await _restore_from(streams, chosen, options)


async def _restore_from(
    streams: IncomingStreams, chosen: ChosenCommand, options: RestoreOptions
) -> RestoredVm:
    started_at = time.monotonic()
    command, options, notes = prepare(chosen.command, options, streams.source)
    attempt = RestoreAttempt(streams, options, started_at, (*chosen.notes, *notes))
    if options.mode is Mode.LAZY:
        return await attempt.lazy_or_load(command)
    if options.mode not in (Mode.AUTO, Mode.INSTANT):
        return await attempt.load(command, "asked for")
    source = streams.source
    try:
        mapped = map_source(command, source)
    except NotSupported as error:
        if options.mode is Mode.INSTANT:
            raise NotSupported(f"no instant restore: {error}") from error
        return await attempt.lazy_or_load(command, f"no instant restore: {error}")
    starting = asyncio.to_thread(start_mapped, source, mapped, options)
    started = await acquired(starting, StartedRestore.end)
    return await attempt.instant_or_load(started, command)
