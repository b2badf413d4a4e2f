"""Engine ``direct``: QEMU writes its device state, this package writes the pages.

The device state goes into a memfd, by one of the methods of
:class:`pyqmigrate.vm.plan.blockers.DeviceStateMethod`. The guest is stopped from the first command
until the last page is written; bitmaps, tail and fsync follow while it runs again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from pyqmigrate.errors import NotSupported
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.stream.configuration import Configuration
from pyqmigrate.format.stream.writer import encode_tail
from pyqmigrate.integrity.save_seal import SaveSeal
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, RamBlock
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport, Sparse
from pyqmigrate.vm.cancellation import check_cancelled, shielded
from pyqmigrate.vm.guest.device_state import DeviceState
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.outgoing.device_state import save_device_state
from pyqmigrate.vm.outgoing.migrate import WhilePaused, Written
from pyqmigrate.vm.outgoing.options import ProgressCallback
from pyqmigrate.vm.outgoing.timeline import Lane, Timeline
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.plan.blockers import DeviceStateMethod
from pyqmigrate.vm.plan.settings import Changes

if TYPE_CHECKING:
    from pyqmigrate.vm.twin.describing import Describing

__all__ = ["FINISH", "encode_rest", "notes_of", "save_direct"]

FINISH = "bitmaps, tail, fsync"

_REPORT_EVERY = 0.1  # seconds


async def save_direct(
    transaction: SaveTransaction,
    guest: GuestInfo,
    way: DeviceStateMethod,
    target: OutputFile,
    changes: Changes,
    *,
    channels: int,
    sparse: Sparse,
    seal: Algorithm | None = None,
    resume: bool,
    describe: bool = True,
    while_paused: WhilePaused | None = None,
    progress: ProgressCallback | None = None,
) -> Written:
    """Write a snapshot into ``target`` and, with ``resume``, resume the guest.

    The file is durable on return. ``transaction`` applies the ``changes`` and rolls everything
    back. ``describe``: if QEMU writes no description of its device state, have a twin make it.
    Raises QemuError, NotSupported if QEMU writes something that a snapshot cannot contain,
    GuestMemoryError, TargetError, Cancelled.
    """
    async with contextlib.AsyncExitStack() as stack:
        describing = None
        if describe and way is DeviceStateMethod.DEVICES_ONLY:
            # Most saves need no twin: they start faster without its modules.
            from pyqmigrate.vm.twin.describing import Describing

            describing = await stack.enter_async_context(Describing(guest))
        return await _save(
            transaction,
            guest,
            way,
            target,
            changes,
            channels=channels,
            sparse=sparse,
            seal=seal,
            resume=resume,
            describing=describing,
            while_paused=while_paused,
            progress=progress,
        )


async def _save(
    transaction: SaveTransaction,
    guest: GuestInfo,
    way: DeviceStateMethod,
    target: OutputFile,
    changes: Changes,
    *,
    channels: int,
    sparse: Sparse,
    seal: Algorithm | None,
    resume: bool,
    describing: Describing | None,
    while_paused: WhilePaused | None,
    progress: ProgressCallback | None,
) -> Written:
    await transaction.apply(changes)
    stopped_at = time.monotonic()
    state = await save_device_state(transaction, guest, way, while_paused)
    check_cancelled()
    observer = None if seal is None else SaveSeal(seal, target.offset)
    job, pages_written = _start(
        target, guest, state, channels, sparse, observer, describing, transaction.timeline
    )
    downtime = None
    try:
        if describing is not None and not (resume and guest.running):
            describing.start(state)  # the guest does not wait
        await _wait_for(pages_written, job, progress)
        if job.done():
            job.result()  # raises its error
        await transaction.check_still_stopped()
        if resume:
            await transaction.resume()
            if guest.running:
                longest = time.monotonic() - stopped_at
                reported = transaction.events.downtime(longest)
                downtime = longest if reported is None else reported
        if describing is not None:
            describing.start(state)
        report = await asyncio.to_thread(job.result)
        if guest.process is not None:
            await asyncio.to_thread(guest.process.check)
    except BaseException:
        job.cancel()
        if describing is not None:
            describing.cancel()
        await shielded(asyncio.to_thread(job.join))
        raise
    if progress is not None:
        progress(job.progress)
    return Written(
        report.bytes_written,
        downtime,
        notes_of(report, describing),
        None if observer is None else observer.manifest,
    )


def _start(
    target: OutputFile,
    guest: GuestInfo,
    state: DeviceState,
    channels: int,
    sparse: Sparse,
    observer: SaveSeal | None,
    describing: Describing | None,
    timeline: Timeline,
) -> tuple[Job[SaveReport], asyncio.Event]:
    """Start to write; the event is set when the pages are written or the job has ended."""
    loop = asyncio.get_running_loop()
    pages_written = asyncio.Event()
    writer = Writer(
        Descriptors(target.fd, target.direct.fd if target.direct else None),
        _ram_blocks(guest, state),
        SaveOptions(
            direct_io=DirectIO.ON if target.direct else DirectIO.OFF,
            sparse=sparse,
            channels=channels,
            machine=state.machine,
            target_page_bits=state.target_page_bits,
            uuid=state.uuid,
        ),
        observer,
    )
    timeline.watch(writer.channels, "write")

    def notify() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(pages_written.set)

    def write() -> SaveReport:
        try:
            writer.begin()
            writer.write_pages()
            notify()
            with timeline.phase(Lane.FILE, FINISH):
                return writer.finish_with(encode_rest(state, describing, writer))
        finally:
            writer.close()

    try:
        job = Job(writer.channels, writer.total, write).at_end(notify)
        return job, pages_written
    except BaseException:
        writer.close()
        raise


class Tailed(Protocol):
    """A file that lacks its tail only."""

    target: OutputFile
    settings: Configuration


def encode_rest(
    state: DeviceState, describing: Describing | None, writer: Tailed
) -> Iterator[bytes]:
    """Generate what follows the pages; flush the file while waiting for the description."""
    description = None
    if describing is not None:
        if not describing.ready:
            writer.target.flush()
        description = describing.wait()
    yield encode_tail(
        settings=writer.settings,
        sections=state.sections,
        description=description or state.description,
        switchover_start=state.switchover_start,
        page_size=state.page_size,
    )


def _ram_blocks(guest: GuestInfo, state: DeviceState) -> list[RamBlock]:
    """Return the blocks, with memory of the stream or of the guest."""
    known = {block.name: block for block in guest.blocks}
    blocks = []
    for name, length in state.blocks.items():
        memory: Memory | None = state.carried.get(name)
        if memory is None and name in known and known[name].length == length:
            memory = known[name].memory
        if memory is None:
            raise NotSupported(
                f"QEMU left out block {name!r} of {length} bytes, and its memory cannot be read"
            )
        blocks.append(RamBlock(name, memory, state.page_size))
    return blocks


async def _wait_for(
    event: asyncio.Event, job: Job[SaveReport], progress: ProgressCallback | None
) -> None:
    while not event.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPORT_EVERY):
                await event.wait()
        if progress is not None:
            progress(job.progress)


def notes_of(report: SaveReport, describing: Describing | None) -> tuple[str, ...]:
    copied = [
        f"memory of block {name!r} is not aligned for direct I/O and was copied"
        for name in report.unaligned_blocks
    ]
    undescribed = [describing.note] if describing is not None and describing.note else []
    return (*copied, *undescribed)
