"""The live method ``precopy``: pages are copied while the guest runs, and again in the pause if they changed.

A digest of each page is taken of the bytes that are written to the file. In the pause all memory is
compared with the digests, and the pages that differ are copied into memory of this process. They are
written after the guest goes on, so the pause does not depend on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from pyqmigrate.errors import LiveSaveAbandoned, NotSupported
from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.integrity.save_seal import SaveSeal
from pyqmigrate.io.available_memory import available_memory
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, RamBlock
from pyqmigrate.io.page_copies import PageCopies
from pyqmigrate.io.page_digests import DigestTable
from pyqmigrate.io.page_table_file import write_page_table
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport, Sparse
from pyqmigrate.vm.cancellation import check_cancelled, shielded
from pyqmigrate.vm.guest.device_state import DeviceState
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.outgoing.device_state import (
    check_same_blocks,
    save_device_state,
    try_device_state,
)
from pyqmigrate.vm.outgoing.direct import FINISH, encode_rest, notes_of
from pyqmigrate.vm.outgoing.live_save import LiveSave
from pyqmigrate.vm.outgoing.migrate import Written
from pyqmigrate.vm.outgoing.timeline import Lane
from pyqmigrate.vm.plan.blockers import DeviceStateMethod
from pyqmigrate.vm.plan.live_precopy import pause_channels

if TYPE_CHECKING:
    from pyqmigrate.vm.twin.describing import Describing

__all__ = ["save_precopy"]

T = TypeVar("T")

_REPORT_EVERY = 0.1  # seconds
_ROUNDS = 3  # passes over memory while the guest runs, at most
_WORTH_A_ROUND = 64 << 20  # bytes; so much is copied in 20 to 40 ms
_RESUMING = 0.004  # seconds of a promised pause that are left for the commands that end it
_COPY_RATE = 2 << 30  # bytes a second
_MOST_MEMORY = 4  # of the available memory, the copies take one part, and the digests one at most
_LEAST_ROOM = 64 << 20  # bytes


async def save_precopy(save: LiveSave) -> Written:
    """Write the snapshot, and leave the guest running or paused as ``save.resume`` says.

    Raises what :func:`~pyqmigrate.vm.outgoing.direct.save_direct` raises, and LiveSaveAbandoned if the
    promised pause cannot be kept: before the guest is stopped where that is foreseen, otherwise the
    guest goes on at once.
    """
    async with contextlib.AsyncExitStack() as stack:
        describing = None
        if save.options.describe and save.engine.way is DeviceStateMethod.DEVICES_ONLY:
            from pyqmigrate.vm.twin.describing import Describing

            describing = await stack.enter_async_context(Describing(save.guest))
        with contextlib.closing(_Precopy(save, describing)) as precopy:
            return await precopy.run()


class _Precopy:
    def __init__(self, save: LiveSave, describing: Describing | None) -> None:
        assert save.engine.way is not None
        self.save, self.guest, self.describing = save, save.guest, describing
        self.way = save.engine.way
        self.max_pause = save.request.max_pause if save.guest.running and save.resume else None
        self.rounds = 0  # passes over memory that copied pages
        self.compare_seconds = 0.0  # that one comparison of all memory takes, if known
        self.carried: dict[str, mmap.mmap] = {}  # blocks whose pages QEMU writes
        seal = save.options.seal
        self.observer = None if seal is None else SaveSeal(seal, save.output.offset)
        self._cleanup = contextlib.ExitStack()
        self.tables: list[DigestTable] = []
        try:
            self.writer = self._make_writer()
            self._cleanup.callback(self.writer.close)
            layouts = self.writer.head.blocks
            _check_memory(sum(layout.num_pages for layout in layouts))
            for layout in layouts:
                self.tables.append(DigestTable(layout.num_pages))
            self.copies = PageCopies(self.writer.memories, layouts, self.tables)
            self._cleanup.callback(self.copies.close)
        except BaseException:
            self.close()
            raise
        self.comparing = self.writer.channels.sibling("pyqmigrate-compare")
        count = max(save.options.channels, pause_channels())
        self.pausing = Channels(count, "pyqmigrate-compare")
        self.writer.channels.join(self.pausing)
        self.timeline = save.transaction.timeline
        self.timeline.watch(self.comparing, "compare")
        self.timeline.watch(self.pausing, "compare and copy")

    def close(self) -> None:
        self._cleanup.close()
        for table in self.tables:
            table.close()

    async def run(self) -> Written:
        save, transaction, describing = self.save, self.save.transaction, self.describing
        progress = save.options.progress
        try:
            if self.max_pause is None:  # otherwise one pause was promised
                await try_device_state(transaction, self.guest, self.way)
            await self._in_job(self._write_live)
            self._check_expected_pause()
            await transaction.apply(save.plan.changes)
            stopped_at = time.monotonic()
            state = await save_device_state(transaction, self.guest, self.way, save.while_paused)
            check_cancelled()
            self._check(state)
            if describing is not None and not (save.resume and self.guest.running):
                describing.start(state)  # the guest does not wait
            await self._copy_changed(stopped_at)
            await transaction.check_still_stopped()
            downtime = None
            if save.resume:
                await transaction.resume()
                if self.guest.running:
                    longest = time.monotonic() - stopped_at
                    reported = transaction.events.downtime(longest)
                    downtime = longest if reported is None else reported
            await check_same_blocks(transaction, self.guest)
            if describing is not None:
                describing.start(state)
            changed = self.copies.copied_bytes
            report = await self._in_job(lambda: self._finish(state))
            if self.guest.process is not None:
                await asyncio.to_thread(self.guest.process.check)
        except BaseException:
            if describing is not None:
                describing.cancel()
            raise
        if progress is not None:
            progress(self.live_job.progress)
        return Written(
            report.bytes_written,
            downtime,
            (*notes_of(report, describing), *self._notes(changed)),
            None if self.observer is None else self.observer.manifest,
            self._release_tables() if save.request.keep_digests else None,
            rounds=self.rounds + 1,
        )

    # ---- while the guest runs -------------------------------------------------------------------

    def _write_live(self) -> None:
        """Write all pages; then, as long as it makes the pause much shorter, those that changed."""
        writer, copies = self.writer, self.copies
        self.timeline.watch(writer.channels, "write, round 1")
        writer.begin()
        writer.write_pages(tables=self.tables)
        self.rounds = 1
        expected = 1 << 63
        while self.guest.running:
            before, expected = expected, self._estimate()
            if expected < _WORTH_A_ROUND or expected > before // 2 or self.rounds == _ROUNDS:
                break
            started_at = time.monotonic()
            copies.copy(self.comparing, _room())
            self.compare_seconds = time.monotonic() - started_at
            self.compare_seconds -= copies.copied_bytes / _COPY_RATE
            self.timeline.watch(writer.channels, f"write, round {self.rounds + 1}")
            writer.rewrite_pages(copies.copied, copies.memories)
            self.rounds += 1
        self.expected = expected

    def _estimate(self) -> int:
        """Return about how many bytes differ from their digests."""
        looked_at = self.comparing.totals().bytes_done
        started_at = time.monotonic()
        expected = self.copies.estimate(self.comparing)
        seconds = time.monotonic() - started_at
        looked_at = self.comparing.totals().bytes_done - looked_at
        if self.rounds == 1 and looked_at:
            self.compare_seconds = seconds * self.writer.total / looked_at
        return expected

    def _check_expected_pause(self) -> None:
        if self.max_pause is None:
            return
        seconds = self.compare_seconds + self.expected / _COPY_RATE + _RESUMING
        if seconds > self.max_pause:
            raise LiveSaveAbandoned(
                f"comparing the memory, and copying {self.expected >> 20} MiB that have changed, would "
                f"pause the guest for about {seconds * 1e3:.0f} ms; {self.max_pause * 1e3:.0f} ms are "
                "allowed"
            )

    # ---- in the pause ---------------------------------------------------------------------------

    def _check(self, state: DeviceState) -> None:
        """Check that the file was begun as this state needs it; take the pages that it has."""
        expected = {layout.name: layout.length for layout in self.writer.head.blocks}
        settings = self.writer.settings
        head = (
            settings.machine,
            settings.target_page_bits,
            settings.uuid,
            self.page_size,
            expected,
        )
        found = (
            state.machine,
            state.target_page_bits,
            state.uuid,
            state.page_size,
            dict(state.blocks),
        )
        if head != found or list(expected) != list(state.blocks):
            raise NotSupported(f"QEMU's stream begins with {found}; {head} was expected")
        for name, memory in self.carried.items():
            if name not in state.carried:
                raise NotSupported(
                    f"QEMU left out block {name!r} of {expected[name]} bytes, and its memory cannot "
                    "be read"
                )
            memory[:] = memoryview(state.carried[name])

    async def _copy_changed(self, stopped_at: float) -> None:
        if self.max_pause is None:
            await self._in_job(self._copy_or_write)
            return
        ends_at = stopped_at + self.max_pause - _RESUMING
        try:
            async with asyncio.timeout(max(ends_at - time.monotonic(), 0)):
                complete = await self._in_job(self._copy)
        except TimeoutError:
            await self._let_go("comparing the memory took longer than this", stopped_at)
        else:
            if not complete:
                await self._let_go("there is not enough memory for what has changed", stopped_at)

    async def _let_go(self, why: str, stopped_at: float) -> None:
        assert self.max_pause is not None
        await shielded(self.save.transaction.resume())
        stood = time.monotonic() - stopped_at
        raise LiveSaveAbandoned(
            f"the guest was let go after {stood * 1e3:.0f} ms: {why}; {self.max_pause * 1e3:.0f} ms "
            "were allowed"
        )

    def _copy(self) -> bool:
        return self.copies.copy(self.pausing, _room())

    def _copy_or_write(self) -> None:
        """Copy what has changed; what there is no memory for is written at once."""
        if self._copy():
            return
        with contextlib.ExitStack() as stack:
            rest = self.copies.find_rest(self.pausing)
            for bitmap in rest:
                stack.callback(bitmap.close)
            self.writer.rewrite_pages(rest)

    # ---- afterwards -----------------------------------------------------------------------------

    def _finish(self, state: DeviceState) -> SaveReport:
        writer = self.writer
        self.timeline.watch(writer.channels, "write what was copied")
        writer.rewrite_pages(self.copies.copied, self.copies.memories)
        if writer.sparse is Sparse.EXACT:
            writer.clean()
        with self.timeline.phase(Lane.FILE, FINISH):
            return writer.finish_with(encode_rest(state, self.describing, writer))

    def _release_tables(self) -> Callable[[Path, SnapshotId], None]:
        """Return what writes the digests; they are its own from now on."""
        blocks, tables, self.tables = self.writer.specs, self.tables, []

        def write(place: Path, snapshot: SnapshotId) -> None:
            try:
                named = {block.name: table for block, table in zip(blocks, tables, strict=True)}
                write_page_table(place, snapshot, blocks, named)
            finally:
                for table in tables:
                    table.close()

        return write

    def _notes(self, changed: int) -> list[str]:
        if not self.guest.running:
            return []
        return [f"{changed / (1 << 20):.1f} MiB had changed and were copied in the pause"]

    async def _in_job(self, work: Callable[[], T]) -> T:
        """Run a part of the save in a thread. Cancellation stops it, and is raised once it has ended."""
        progress = self.save.options.progress
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended.set)

        job = Job(self.writer.channels, self.writer.total, work).at_end(notify)
        if not self.rounds:
            self.live_job = job
        try:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_REPORT_EVERY):
                        await ended.wait()
                if progress is not None and job is self.live_job:
                    progress(job.progress)
            return job.result()
        except BaseException:
            job.cancel()
            await shielded(asyncio.to_thread(job.join))
            raise

    # ---- the file -------------------------------------------------------------------------------

    @property
    def page_size(self) -> int:
        return 1 << (self.guest.target_page_bits or 12)

    def _make_writer(self) -> Writer:
        guest, options, output = self.guest, self.save.options, self.save.output
        if guest.target_page_bits is None:
            raise NotSupported("the page size of this guest is not known before it is stopped")
        return Writer(
            Descriptors(output.fd, output.direct.fd if output.direct else None),
            [RamBlock(b.name, self._memory_of(b.name), self.page_size) for b in guest.blocks],
            SaveOptions(
                direct_io=DirectIO.ON if output.direct else DirectIO.OFF,
                sparse=self.save.plan.sparse,
                channels=options.channels,
                machine=guest.machine,
                uuid=_uuid(guest),
            ),
            self.observer,
        )

    def _memory_of(self, name: str) -> Memory:
        block = next(block for block in self.guest.blocks if block.name == name)
        if block.memory is not None:
            return block.memory
        # QEMU writes it with the device state: zeros until then.
        self.carried[name] = memory = mmap.mmap(
            -1, block.length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        return memory


def _uuid(guest: GuestInfo) -> bytes | None:
    return UUID(guest.uuid).bytes if guest.capabilities.get("validate-uuid") else None


def _check_memory(pages: int) -> None:
    """Raise NotSupported if the digests of so many pages take much of the available memory: the
    kernel might end the guest to get more."""
    available, needed = available_memory(), pages * DIGEST_SIZE
    if available is not None and needed > available // _MOST_MEMORY:
        raise NotSupported(
            f"the digests of the memory take {needed >> 20} MiB, and the host has only "
            f"{available >> 20} MiB available"
        )


def _room() -> int:
    """Return how many bytes of copies this process may make."""
    return max((available_memory() or 0) // _MOST_MEMORY, _LEAST_ROOM)
