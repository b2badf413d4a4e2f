"""The pages of a sequential stream, put to their places in files, in one pass.

Records come one after another, and a page may come again: as a whole, as zeros, or as changes to
what it was. Every page has a fixed place in the file that is written, so nothing has to be noted of
where it was in the stream. A part of a block, at most 16 MiB, is on the *stage*: records are put
together there. When one comes that belongs elsewhere, a thread writes the part as a save does
(runs, gaps, direct I/O), while the next part is put on another stage. What a change needs to know
of an earlier round is read back from the file.

The source is read front to back, once. It costs the stages, and two bits a page.
"""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pyqmigrate.core import Block, Channel, File, Policy, Transfer, error_from_fault
from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.format.stream.sequential import ListedBlock, SequentialStream, SequentialWalk
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.records import STAGING_MAX, Decoded, StagingBuffer
from pyqmigrate.io.target import Direct, InputFile
from pyqmigrate.io.threads import starting_threads
from pyqmigrate.snapshot.load.sequential import PolledSource, RecordDecoder, read_body

__all__ = ["Place", "StreamUnpacker"]

_MOST_THREADS = 4


@dataclass(frozen=True)
class Place:
    """Where the pages of one block go: page ``k`` to ``offset + k * page_size`` of a file, in
    which that is a hole.

    ``fd`` is buffered, open for reading and writing; ``direct`` goes past the page cache. Bits of
    ``bitmap`` are set for the pages that have something else than zeros; none is at first.
    """

    fd: int
    direct: Direct | None
    offset: int
    bitmap: Bitmap


class StreamUnpacker:
    """One pass: its head is parsed on construction, :meth:`run` does the rest.

    ``channels`` write, and are cancelled along with ``reading``, which reads and counts progress.
    ``policy`` is that for zero pages, ``target`` names what is written in errors.
    """

    def __init__(
        self,
        source: InputFile,
        channels: Channels,
        policy: Policy,
        target: str,
        *,
        page_size: int | None = None,
    ) -> None:
        self.source = source
        self.channels = channels
        self.target = target
        self._policy = policy
        self.reading = Channels(1, "pyqmigrate-pass")
        self.reading.join(channels)
        polled = PolledSource(source, self.reading)
        self._walk = SequentialWalk(
            polled, source.offset, self._read_records, page_size=page_size, run_out=polled.run_out
        )
        self._walk.read_head()
        self.blocks = self._walk.blocks
        self.page_size = self._walk.page_size
        self.mentioned: frozenset[str] = frozenset()
        self._visited: set[tuple[int, int]] = set()  # parts: number of the block, and offset
        self._stale: set[tuple[int, int]] = set()

    def run(self, places: Mapping[str, Place]) -> SequentialStream:
        """Read to the end of the stream, and put the pages of the blocks that have a place.

        After that ``mentioned`` has the names of these blocks that have any record. Raises
        SnapshotError, NotSupported, TargetError, Cancelled.
        """
        with contextlib.ExitStack() as stack:
            self._parts = [self._part(block, places.get(block.name)) for block in self.blocks]
            seen = {}
            for block in self.blocks:
                if block.name in places:
                    seen[block.name] = Bitmap(block.length // self.page_size)
                    stack.callback(seen[block.name].close)
            self._records = self._new_records(seen)
            threads = min(self.channels.count, _MOST_THREADS)
            self._current: _Stage | None = None
            self._stages = deque(_Stage(stack, self.page_size) for _ in range(threads + 1))
            # The last to be entered: no thread works on what the others let go of.
            self._threads = stack.enter_context(ThreadPoolExecutor(threads, "pyqmigrate-stage"))
            stack.push(lambda kind, *_: self.channels.cancel() if kind else None)
            stream = self._walk.stream()
            self._write_current()
            if self._policy.everything:
                self._write_unvisited()
            for stage in self._stages:
                self._await(stage)
            self._clean()
            self.mentioned = frozenset(name for name, bits in seen.items() if bits.last() >= 0)
        return stream

    def _part(self, block: ListedBlock, place: Place | None) -> _Placed | None:
        if place is None:
            return None
        # A page that is less than a unit of direct I/O would be written along with others, which
        # are not on the stage.
        direct = place.direct
        if direct is not None and self.page_size % direct.off_align:
            direct = None
        core = Block(block.length, self.page_size, place.offset)
        job, data = self.channels.core, place.bitmap
        return _Placed(
            place,
            Transfer(job, core, file=File(place.fd, direct), policy=self._policy, data=data),
            Transfer(job, core, file=File(place.fd), data=data),
        )

    def _new_records(self, seen: Mapping[str, Bitmap]) -> RecordDecoder:
        records = RecordDecoder(self.blocks, self.page_size)
        for number, block in enumerate(self.blocks):
            if block.name in seen:
                records.write_to_staging(number, seen[block.name])
        records.start()
        return records

    def _read_records(self, offset: int) -> int:
        self._records.position = offset
        while True:
            rc = read_body(self.reading, self._records, self.source)
            if rc == Decoded.UNSTAGED:
                self._turn()
            elif rc < 0:
                raise self._failure(rc)
            else:
                return self._records.position

    def _failure(self, rc: int) -> PyqmigrateError:
        fault = self._records.fault
        if fault.in_memory and rc != -errno.EBADMSG:  # which is our own file
            fault.clear()
            return error_from_fault(rc, fault, self.target, self.blocks[fault.block].name)
        return self._records.failure(rc, self.source)

    # ---- stages ----

    def _turn(self) -> None:
        """Put that part on a stage which the next record is about."""
        number, offset = self._records.unstaged()
        self._write_current()
        self._put(number, offset // STAGING_MAX * STAGING_MAX)

    def _put(self, number: int, off: int) -> None:
        for stage in self._stages:  # what the file has of it must be there first
            if stage.part == (number, off):
                self._await(stage)
        stage = self._stages.popleft()
        self._await(stage)
        placed = self._parts[number]
        assert placed is not None
        place = placed.place
        length = min(STAGING_MAX, self.blocks[number].length - off)
        stage.buffer.place(off, length, place.fd, place.offset + off, place.bitmap)
        stage.part = (number, off)
        self._visited.add(stage.part)
        self._records.stage(number, stage.buffer)
        self._current = stage

    def _write_current(self) -> None:
        stage, self._current = self._current, None
        if stage is not None:
            with starting_threads():
                stage.written = self._threads.submit(self._write, stage)
            self._stages.append(stage)

    def _await(self, stage: _Stage) -> None:
        if stage.written is not None:
            written, stage.written = stage.written, None
            if written.result():
                self._stale.add(stage.part)

    def _write(self, stage: _Stage) -> int:
        """Returns how many pages have old bytes in the file now."""
        number, _ = stage.part
        placed = self._parts[number]
        assert placed is not None
        rc = stage.buffer.write(placed.transfer, stage.channel)
        if rc < 0:
            raise error_from_fault(rc, stage.channel.fault, self.target, self.blocks[number].name)
        return rc

    # ---- afterwards ----

    def _write_unvisited(self) -> None:
        """Where every page is to be written, also those that no record is about."""
        for number, block in enumerate(self.blocks):
            placed = self._parts[number]
            if placed is None:
                continue
            for off in range(0, block.length, STAGING_MAX):
                if (number, off) not in self._visited:
                    self._put(number, off)
                    self._write_current()

    def _clean(self) -> None:
        """Make the pages that have ceased to hold data zeros in the file too."""
        channel = Channel()
        for number, off in sorted(self._stale):
            placed, block = self._parts[number], self.blocks[number]
            assert placed is not None
            first = off // self.page_size
            npages = min(STAGING_MAX, block.length - off) // self.page_size
            rc = placed.buffered.punch_stale(channel, first, npages)
            if rc < 0:
                raise error_from_fault(rc, channel.fault, self.target, block.name)


@dataclass(frozen=True)
class _Placed:
    """A block's place, and the transfers to it: by ``policy`` and direct I/O, and buffered."""

    place: Place
    transfer: Transfer
    buffered: Transfer


class _Stage:
    """Memory for a part of a block, with what the thread needs that writes it."""

    def __init__(self, stack: contextlib.ExitStack, page_size: int) -> None:
        self.buffer = StagingBuffer(stack, page_size)
        self.channel = Channel()
        self.part = (-1, 0)  # number of the block, and the offset in it
        self.written: Future[int] | None = None
