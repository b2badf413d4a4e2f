"""Move the pages of a sequential stream to fixed places in files, in one pass.

Records come one after another, and a page may come again: as a whole, as zeros, or as changes to its
last content. Every page has a fixed place in the output, so its place in the stream is not recorded.
A part of a block, at most 16 MiB, is in a *staging buffer*, where records are applied. At a record
of another part, a thread writes the buffer as a save does (runs, gaps, direct I/O), while the next
part goes into another buffer. The earlier content that a change needs is read back from the file.

The source is read front to back, once. This needs memory for the buffers, and two bits for each page.
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
from pyqmigrate.format.stream.sequential import (
    ListedBlock,
    SequentialStream,
    SequentialStreamReader,
)
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.direct_io import Direct
from pyqmigrate.io.records import STAGING_MAX, Decoded, StagingBuffer
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.threads import starting_threads
from pyqmigrate.snapshot.records import PolledSource, RecordDecoder, read_body

__all__ = ["Place", "StreamUnpacker"]

_MOST_THREADS = 4


@dataclass(frozen=True)
class Place:
    """Where the pages of one block go: page ``k`` to ``offset + k * page_size`` of a file, which is
    a hole there.

    ``fd`` is buffered, open for reading and writing; ``direct`` goes past the page cache. Bits of
    ``bitmap`` are set for pages with data; all are clear at first.
    """

    fd: int
    direct: Direct | None
    offset: int
    bitmap: Bitmap


class StreamUnpacker:
    """One pass. Construction parses the head, :meth:`run` does the rest.

    ``channels`` write, and are cancelled along with ``reading``, which reads and counts progress.
    ``policy`` is that for zero pages, ``target`` names what is written in errors.
    """

    def __init__(
        self,
        stream_file: StreamFile,
        channels: Channels,
        policy: Policy,
        target: str,
        *,
        page_size: int | None = None,
    ) -> None:
        self.source = source = stream_file.source
        self.channels = channels
        self.target = target
        self._policy = policy
        self.reading = Channels(1, "pyqmigrate-pass")
        self.reading.join(channels)
        polled = PolledSource(source, self.reading)
        self._walk = SequentialStreamReader(
            polled,
            stream_file.offset,
            self._read_records,
            page_size=page_size,
            run_out=polled.run_out,
        )
        self._walk.read_head(stream_file.start)
        self.blocks = self._walk.blocks
        self.page_size = self._walk.page_size
        self.mentioned: frozenset[str] = frozenset()
        self._visited: set[tuple[int, int]] = set()  # parts: number of the block, and offset
        self._stale: set[tuple[int, int]] = set()

    def run(self, places: Mapping[str, Place]) -> SequentialStream:
        """Read to the end of the stream, and write the pages of the blocks that have a place.

        Then ``mentioned`` has the names of those blocks that have any record. Raises SnapshotError,
        NotSupported, TargetError, Cancelled.
        """
        with contextlib.ExitStack() as stack:
            self._parts = [self._part(block, places.get(block.name)) for block in self.blocks]
            seen: dict[str, Bitmap] = {}
            stack.callback(_close_all, seen)
            for block in self.blocks:
                if block.name in places:
                    seen[block.name] = Bitmap(block.length // self.page_size)
            self._records = self._new_records(seen)
            threads = min(self.channels.count, _MOST_THREADS)
            self._current: _StagingBuffer | None = None
            self._buffers = deque(_StagingBuffer(stack, self.page_size) for _ in range(threads + 1))
            # Entered last, so that no thread uses what the other callbacks release.
            self._threads = stack.enter_context(ThreadPoolExecutor(threads, "pyqmigrate-stage"))
            stack.push(lambda kind, *_: self.channels.cancel() if kind else None)
            stream = self._walk.stream()
            self._write_current()
            if self._policy.everything:
                self._write_unvisited()
            for buffer in self._buffers:
                self._await(buffer)
            self._clean()
            self.mentioned = frozenset(name for name, bits in seen.items() if bits.last() >= 0)
        return stream

    def _part(self, block: ListedBlock, place: Place | None) -> _Placed | None:
        if place is None:
            return None
        # A page smaller than a unit of direct I/O would be written together with pages that are
        # not in the buffer.
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
                raise self._error(rc)
            else:
                return self._records.position

    def _error(self, rc: int) -> PyqmigrateError:
        fault = self._records.fault
        if fault.in_memory and rc != -errno.EBADMSG:  # the memory here is our output
            fault.clear()
            return error_from_fault(rc, fault, self.target, self.blocks[fault.block].name)
        return self._records.error_from_decoder(rc, self.source)

    # ---- staging buffers ----

    def _turn(self) -> None:
        """Switch to a buffer with the part of the next record."""
        number, offset = self._records.unstaged()
        self._write_current()
        self._put(number, offset // STAGING_MAX * STAGING_MAX)

    def _put(self, number: int, off: int) -> None:
        for buffer in self._buffers:  # an earlier buffer of this part must be in the file first
            if buffer.part == (number, off):
                self._await(buffer)
        buffer = self._buffers.popleft()
        self._await(buffer)
        placed = self._parts[number]
        assert placed is not None
        place = placed.place
        length = min(STAGING_MAX, self.blocks[number].length - off)
        buffer.core.place(off, length, place.fd, place.offset + off, place.bitmap)
        buffer.part = (number, off)
        self._visited.add(buffer.part)
        self._records.stage(number, buffer.core)
        self._current = buffer

    def _write_current(self) -> None:
        buffer, self._current = self._current, None
        if buffer is not None:
            with starting_threads():
                buffer.written = self._threads.submit(self._write, buffer)
            self._buffers.append(buffer)

    def _await(self, buffer: _StagingBuffer) -> None:
        if buffer.written is not None:
            written, buffer.written = buffer.written, None
            if written.result():
                self._stale.add(buffer.part)

    def _write(self, buffer: _StagingBuffer) -> int:
        """Write a buffer; return how many pages have old bytes in the file now."""
        number, _ = buffer.part
        placed = self._parts[number]
        assert placed is not None
        rc = buffer.core.write(placed.transfer, buffer.channel)
        if rc < 0:
            raise error_from_fault(rc, buffer.channel.fault, self.target, self.blocks[number].name)
        return rc

    # ---- afterwards ----

    def _write_unvisited(self) -> None:
        """Write the parts that no record mentioned, if every page is to be written."""
        for number, block in enumerate(self.blocks):
            placed = self._parts[number]
            if placed is None:
                continue
            for off in range(0, block.length, STAGING_MAX):
                if (number, off) not in self._visited:
                    self._put(number, off)
                    self._write_current()

    def _clean(self) -> None:
        """Zero the pages in the file that no longer have data."""
        channel = Channel()
        for number, off in sorted(self._stale):
            placed, block = self._parts[number], self.blocks[number]
            assert placed is not None
            first = off // self.page_size
            npages = min(STAGING_MAX, block.length - off) // self.page_size
            rc = placed.buffered.punch_stale(channel, first, npages)
            if rc < 0:
                raise error_from_fault(rc, channel.fault, self.target, block.name)


def _close_all(bitmaps: Mapping[str, Bitmap]) -> None:
    for bitmap in bitmaps.values():
        bitmap.close()


@dataclass(frozen=True)
class _Placed:
    """A block's place, and the transfers to it: by ``policy`` and direct I/O, and buffered."""

    place: Place
    transfer: Transfer
    buffered: Transfer


class _StagingBuffer:
    """A staging buffer for a part of a block, with the state of the thread that writes it."""

    def __init__(self, stack: contextlib.ExitStack, page_size: int) -> None:
        self.core = StagingBuffer(stack, page_size)
        self.channel = Channel()
        self.part: tuple[int, int] = (-1, 0)  # number of the block, and the offset in it
        self.written: Future[int] | None = None
