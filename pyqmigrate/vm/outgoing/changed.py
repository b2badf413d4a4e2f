"""The live method ``changed``: only the pages changed since the restore are copied, in the pause.

The guest maps its base privately (:mod:`pyqmigrate.vm.guest.guest_base`). Everything is opened, checked
and made resident while it runs. It stands still while QEMU writes its device state and the changed
pages are copied to memory (:mod:`pyqmigrate.io.stash`); the file is written after it goes on. Three
kinds of file can be written:

- without a base in the request, a whole snapshot: the changed pages, the others from the base;
- with a base, an increment of it;
- with a base and ``full``, a whole snapshot that shares the other pages with the base on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeVar

from pyqmigrate.errors import Cancelled, LiveSaveAbandoned, NoSpace, NotSupported, UsageError
from pyqmigrate.format.increment import MAGIC as INCREMENT_MAGIC
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.integrity.save_seal import SaveSeal
from pyqmigrate.io.available_memory import available_memory
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.page_digests import PageDigests
from pyqmigrate.io.stash import Stash, StashBlock
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.save.increment import Base, IncrementWriter, increment_offset
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.reflink import ReflinkWriter
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport, Sparse
from pyqmigrate.vm.cancellation import acquired, check_cancelled, shielded
from pyqmigrate.vm.guest.device_state import DeviceState, memory_file
from pyqmigrate.vm.guest.guest_base import GuestBase
from pyqmigrate.vm.outgoing.device_state import (
    check_same_blocks,
    read_device_sections_of,
    save_device_sections,
)
from pyqmigrate.vm.outgoing.direct import FINISH, encode_rest
from pyqmigrate.vm.outgoing.live_save import LiveSave
from pyqmigrate.vm.outgoing.migrate import Written
from pyqmigrate.vm.outgoing.timeline import Lane
from pyqmigrate.vm.plan.live_changed import expected_pause
from pyqmigrate.vm.plan.settings import no_changes

if TYPE_CHECKING:
    from pyqmigrate.vm.twin.describing import Describing

__all__ = ["save_changed"]

R = TypeVar("R")

_REPORT_EVERY = 0.1  # seconds
_RESUME = 0.003  # seconds, to let the guest go on
_SPARE = 8 << 20  # bytes of a file besides pages and bitmaps
_MEMORY_SHARE = 0.75  # of the available memory: the copies may take it
_GROWTH = 1.5  # of what has changed, until the guest is stopped


async def save_changed(save: LiveSave) -> Written:
    """Write the snapshot, and leave the guest running or paused as ``save.resume`` says.

    Raises NotSupported, LiveSaveAbandoned if the promised pause cannot be kept, SnapshotError if the
    base is not usable or was replaced, NoSpace, QemuError, GuestMemoryError, TargetError, Cancelled.
    """
    async with contextlib.AsyncExitStack() as stack:
        describing = None
        if save.options.describe:
            from pyqmigrate.vm.twin.describing import Describing

            describing = await stack.enter_async_context(Describing(save.guest))
            describing.start_ahead()
        finding = asyncio.to_thread(GuestBase.find, save.guest, save.request.base)
        base = await acquired(finding, GuestBase.close)
        stack.callback(base.close)
        _refuse_as_target(save, base)
        changed = await acquired(
            asyncio.to_thread(_Changed, save, base, describing), _Changed.close
        )
        stack.callback(changed.close)
        return await changed.run()


def _refuse_as_target(save: LiveSave, base: GuestBase) -> None:
    """Raise UsageError if an increment would replace its own base."""
    place = save.output.place
    if save.request.base is None or save.request.full or place is None or base.path is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if os.path.samefile(place, base.path):
            raise UsageError(
                f"{save.output.name!r} is the base of the increment, and would be overwritten: write "
                "to another file"
            )


class _Kind(Enum):
    """The kinds of file."""

    WHOLE = auto()
    INCREMENT = auto()
    CLONE = auto()


class _Changed:
    """One save by this method. Close it after the file was written."""

    def __init__(self, save: LiveSave, base: GuestBase, describing: Describing | None) -> None:
        """Prepare everything that is possible while the guest runs. Blocks."""
        self.save, self.base, self.describing = save, base, describing
        self._digests: PageDigests | None = None
        self._differing: dict[str, Bitmap] = {}
        self._stopped_ns = 0
        self._stash: Stash | None = None
        self._notes: list[str] = []
        self._whole = {block.name for block in base.whole}
        self._clone: ReflinkWriter | None = None
        self._kind = _Kind.WHOLE
        if save.request.base is not None:
            self._kind = _Kind.CLONE if save.request.full else _Kind.INCREMENT
        try:
            if self._kind is _Kind.CLONE:
                self._clone = self._begin_clone()
            blocks = self._mapped() if base.ram is not None else self._compared()
            whole = [StashBlock(b.name, b.memory, self._page_size) for b in base.whole if b.memory]
            self._stash = Stash([*blocks, *whole])
            channels = save.options.channels
            started = time.monotonic()
            with save.transaction.timeline.phase(Lane.PAGES, "find changed pages"):
                if self._digests is not None:
                    self._compare().wait()
                expected = self._stash.prepare(channels=channels, room=_room())
            self._check(expected, time.monotonic() - started)
        except BaseException:
            self.close()
            raise

    def _begin_clone(self) -> ReflinkWriter:
        base, guest = self.base.snapshot, self.save.guest
        if base.machine != guest.machine:
            raise NotSupported("the base names no machine type, so its clone would not, either")
        first = base.layouts[0].header_offset
        if any(s.kind is SectionKind.FULL and s.offset < first for s in base.stream.sections):
            raise NotSupported("the base has device state before its RAM, which a clone would keep")
        clone = ReflinkWriter(self.save.output, base, channels=self.save.options.channels)
        clone.begin()
        return clone

    @property
    def stash(self) -> Stash:
        assert self._stash is not None
        return self._stash

    @property
    def _page_size(self) -> int:
        return next(block.page_size for block in self.base.snapshot.blocks.values())

    def _mapped(self) -> list[StashBlock]:
        ram = self.base.ram
        assert ram is not None
        known = self.base.blocks
        blocks = []
        for block in ram.blocks:
            memory = known[block.name].memory
            assert memory is not None
            blocks.append(
                StashBlock(block.name, memory, block.page_size, changed=ram.pages_of(block.name))
            )
        return blocks

    def _compared(self) -> list[StashBlock]:
        """Return the blocks whose changed pages are found by digests."""
        blocks = [
            RamBlock(name, block.memory, self._page_size)
            for name, block in self.base.blocks.items()
            if name not in self._whole and block.memory is not None
        ]
        tables = {block.name: self.base.tables[block.name] for block in blocks}
        self._digests = PageDigests(blocks, tables)
        self._differing = {name: Bitmap(table.npages) for name, table in tables.items()}
        return [
            StashBlock(block.name, block.memory, block.page_size, pages=self._differing[block.name])
            for block in blocks
        ]

    def _compare(self) -> Job[object]:
        """Begin to find the pages that differ from their digests. They stay differing."""
        assert self._digests is not None
        return self._digests.start_compare(
            self._differing, update=False, channels=self.save.options.channels
        )

    def _check(self, expected: int, scan: float) -> None:
        """Raise NoSpace or LiveSaveAbandoned, before the guest is stopped, where it is foreseeable."""
        save, base = self.save, self.base
        need = int(expected * _GROWTH) + _SPARE
        need += sum(b.length // b.page_size // 8 for b in base.snapshot.blocks.values())
        if save.request.base is None:
            need += base.data_bytes
        free = save.output.free_bytes()
        if free is not None and need > free:
            raise NoSpace(
                f"the snapshot may need {need >> 20} MiB and {free >> 20} MiB are free",
                save.output.name,
            )
        limit = self._limit
        if limit is None:
            return
        compared = sum(bits.npages * self._page_size for bits in self._differing.values())
        pause = expected_pause(expected, scan=0.0 if compared else scan, compared=compared)
        if pause > limit:
            raise LiveSaveAbandoned(
                f"{expected >> 20} MiB would be copied in a pause of about {pause * 1e3:.0f} ms, and "
                f"{limit * 1e3:.0f} ms are allowed"
            )

    @property
    def _limit(self) -> float | None:
        """The promised pause in seconds; None without one."""
        return self.save.request.max_pause if self.save.guest.running and self.save.resume else None

    # ---- the pause --------------------------------------------------------------------------

    async def run(self) -> Written:
        save, guest = self.save, self.save.guest
        await save.transaction.apply(no_changes())
        with memory_file() as (written, read):
            async with save.transaction.add_fds({"device-state": written}) as path:
                if self.describing is not None:
                    await self.describing.until_ready()
                downtime = await self._pause(path)
            await check_same_blocks(save.transaction, guest)
            state = await asyncio.to_thread(read_device_sections_of, guest, read)
        check_cancelled()
        if guest.process is not None:
            await asyncio.to_thread(guest.process.check)
        report, observer = await self._write(state)
        base = self.base
        await asyncio.to_thread(base.check_unchanged)
        is_increment = self._kind is _Kind.INCREMENT
        return Written(
            report.bytes_written,
            downtime,
            (*self._notes, *self._notes_on(report)),
            None if observer is None else observer.manifest,
            rounds=1,
            base=os.fspath(base.path) if is_increment and base.path is not None else None,
            changed_pages=self._changed_pages if is_increment else None,
            confirm=base.mark.check,
        )

    @property
    def _changed_pages(self) -> int:
        return sum(bitmap.count() for bitmap in self.stash.pages.values())

    async def _pause(self, path: str) -> float | None:
        """Stop the guest, have its device state written to ``path``, copy its changed pages and let it
        go on. Return for how long it stood still, in seconds."""
        save, transaction = self.save, self.save.transaction
        stopped_at = time.monotonic()
        if save.guest.running:
            await transaction.stop()
        self._stopped_ns = time.time_ns()
        transaction.events.mark_stopped()
        try:
            if save.while_paused is not None:
                await save.while_paused()
            self._check_limit(stopped_at)
            with transaction.timeline.phase(Lane.QEMU, "device state"):
                await save_device_sections(transaction, save.guest, path)
            self._check_limit(stopped_at)
            with transaction.timeline.phase(Lane.PAGES, "copy changed pages"):
                if self._digests is not None:
                    await self._limited(self._compare(), stopped_at)
                copying = self.stash.start_copy(channels=save.options.channels)
                await self._limited(copying, stopped_at)
            await transaction.check_still_stopped()
        except LiveSaveAbandoned:
            if save.guest.running and save.while_paused is None:
                await shielded(transaction.resume())  # sooner than by the rollback
            raise
        if not save.resume:
            return None
        await transaction.resume()
        if not save.guest.running:
            return None
        longest = time.monotonic() - stopped_at
        reported = transaction.events.downtime(longest)
        downtime = longest if reported is None else reported
        if self._limit is not None and downtime > self._limit:
            self._notes.append(
                f"the pause was {downtime * 1e3:.1f} ms, longer than the {self._limit * 1e3:g} ms "
                "promised: its last step was slower than expected"
            )
        return downtime

    def _check_limit(self, stopped_at: float) -> None:
        if self._left(stopped_at) <= 0:
            raise self._too_long()

    def _left(self, stopped_at: float) -> float:
        """Return the seconds that are left for copying."""
        if self._limit is None:
            return float("inf")
        return stopped_at + self._limit - _RESUME - time.monotonic()

    def _too_long(self) -> LiveSaveAbandoned:
        assert self._limit is not None
        return LiveSaveAbandoned(
            f"the changed pages could not be copied within {self._limit * 1e3:g} ms, and the guest was "
            "let go"
        )

    async def _limited(self, job: Job[R], stopped_at: float) -> R:
        """Return the result of a job; cancel it when the pause would become too long."""
        loop = asyncio.get_running_loop()
        left = self._left(stopped_at)
        expired: list[bool] = []

        def expire() -> None:
            expired.append(True)
            job.cancel()

        timer = None if left == float("inf") else loop.call_later(max(left, 0), expire)
        try:
            return await asyncio.to_thread(job.result)
        except Cancelled:
            if expired:
                raise self._too_long() from None
            raise
        except BaseException:
            job.cancel()
            await shielded(asyncio.to_thread(job.join))
            raise
        finally:
            if timer is not None:
                timer.cancel()

    # ---- the file ---------------------------------------------------------------------------

    async def _write(self, state: DeviceState) -> tuple[SaveReport, SaveSeal | None]:
        progress = self.save.options.progress
        job, observer = self._start(state)
        try:
            if self.describing is not None:
                self.describing.start(state)
            waiting = asyncio.ensure_future(asyncio.to_thread(job.result))
            while not (await asyncio.wait([waiting], timeout=_REPORT_EVERY))[0]:
                if progress is not None:
                    progress(job.progress)
            report = waiting.result()
        except BaseException:
            job.cancel()
            if self.describing is not None:
                self.describing.cancel()
            await shielded(asyncio.to_thread(job.join))
            raise
        if progress is not None:
            progress(job.progress)
        return report, observer

    def _start(self, state: DeviceState) -> tuple[Job[SaveReport], SaveSeal | None]:
        """Start to write the file, in threads."""
        if self._clone is not None:
            return self._start_clone(self._clone, state), None
        writer: Writer
        seal = self.save.options.seal
        observer = None
        selections: Sequence[Bitmap | None] | None = None
        if self._kind is _Kind.INCREMENT:
            described = Base.of(self.base.snapshot)
            if seal is not None:
                observer = SaveSeal(seal, increment_offset(described), first=INCREMENT_MAGIC)
            writer = IncrementWriter(
                self._target,
                self._changes(),
                replace(self._options(state), sparse=Sparse.EXACT),
                described,
                observer,
                created_ns=self._stopped_ns,
            )
            writer.target.place = self.save.output.place
            selections = self._selections()
        else:
            if seal is not None:
                observer = SaveSeal(seal, self.save.output.offset)
            writer = Writer(self._target, self._layers(), self._options(state), observer)
        timeline = self.save.transaction.timeline
        timeline.watch(writer.channels, "write")

        def write() -> SaveReport:
            try:
                writer.begin()
                writer.write_pages(selections)
                with timeline.phase(Lane.FILE, FINISH):
                    report = writer.finish_with(encode_rest(state, self.describing, writer))
                # It gets its name as what it has become.
                self.save.output.prefix = writer.target.prefix
                self.save.output.offset = writer.target.offset
                return report
            finally:
                writer.close()

        try:
            return Job(writer.channels, writer.total, write), observer
        except BaseException:
            writer.close()
            raise

    def _start_clone(self, clone: ReflinkWriter, state: DeviceState) -> Job[SaveReport]:
        self.save.transaction.timeline.watch(clone.channels, "write")

        def write() -> SaveReport:
            return clone.write(
                self._changes(),
                self._selections(),
                lambda: encode_rest(state, self.describing, clone),
            )

        return Job(clone.channels, clone.total, write)

    def _selections(self) -> list[Bitmap | None]:
        """Return the pages to write of each block, in the order of the base; None is all of them."""
        return [
            None if name in self._whole else self.stash.pages[name]
            for name in self.base.snapshot.blocks
        ]

    def _changes(self) -> list[RamBlock]:
        """Return the blocks with the changed pages, in the order of the base."""
        identity = self.base.snapshot.identity
        return [
            RamBlock(
                name,
                self.stash.buffer(name)
                if name in self._whole
                else self.stash.memory_of(name, identity),
                block.page_size,
            )
            for name, block in self.base.snapshot.blocks.items()
        ]

    @property
    def _target(self) -> Descriptors:
        direct = self.save.output.direct
        return Descriptors(self.save.output.fd, direct.fd if direct else None)

    def _options(self, state: DeviceState) -> SaveOptions:
        return SaveOptions(
            direct_io=DirectIO.ON if self.save.output.direct else DirectIO.OFF,
            sparse=self.save.plan.sparse,
            channels=self.save.options.channels,
            machine=state.machine,
            target_page_bits=state.target_page_bits,
            uuid=state.uuid,
        )

    def _layers(self) -> Sequence[RamBlock]:
        """Return the whole memory of the guest at the instant: changed pages over the base."""
        return [
            RamBlock(
                name,
                self.stash.buffer(name)
                if name in self._whole
                else self.stash.over(name, block.memory()),
                block.page_size,
            )
            for name, block in self.base.snapshot.blocks.items()
        ]

    def _notes_on(self, report: SaveReport) -> list[str]:
        notes = [
            f"memory of block {name!r} is not aligned for direct I/O and was copied"
            for name in report.unaligned_blocks
        ]
        if self.describing is not None and self.describing.note:
            notes.append(self.describing.note)
        changed = self._changed_pages * self._page_size
        if self._kind is _Kind.INCREMENT and changed > self.base.data_bytes / 2:
            notes.append(
                f"{changed >> 20} MiB differ from the base, more than half of its "
                f"{self.base.data_bytes >> 20} MiB: a whole snapshot, restored with mode instant, "
                "would be a better base for the next increments"
            )
        return notes

    def close(self) -> None:
        """Release the memory. Idempotent."""
        if self._stash is not None:
            self._stash.close()
        if self._digests is not None:
            self._digests.close()
        for bitmap in self._differing.values():
            bitmap.close()


def _room() -> int | None:
    """Return how many bytes of copies this process may make; None if the available memory is unknown.

    Without a limit the copies of a guest that changed most of its memory could have the kernel end
    that guest.
    """
    available = available_memory()
    return None if available is None else int(available * _MEMORY_SHARE)
