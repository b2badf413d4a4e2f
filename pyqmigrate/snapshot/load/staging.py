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
import mmap
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pyqmigrate import _core
from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.format.stream.sequential import ListedBlock, SequentialStream, SequentialWalk
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, failure
from pyqmigrate.io.mapping import unmap
from pyqmigrate.io.target import Direct, InputFile, core_file
from pyqmigrate.io.threads import starting_threads
from pyqmigrate.snapshot.load.sequential import PolledSource, RecordDecoder, read_body

__all__ = ["Place", "StreamUnpacker"]

_PART: int = _core.lib.QM_STAGING_MAX  # bytes of a block on one stage
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
    ``sparse`` is the core's policy for zero pages, ``target`` names what is written in errors.
    """

    def __init__(
        self,
        source: InputFile,
        channels: Channels,
        sparse: Any,
        target: str,
        *,
        page_size: int | None = None,
    ) -> None:
        self.source = source
        self.channels = channels
        self.target = target
        self._sparse = sparse
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
            if self._sparse.everything:
                self._write_unvisited()
            for stage in self._stages:
                self._await(stage)
            self._clean()
            self.mentioned = frozenset(name for name, bits in seen.items() if bits.last() >= 0)
        return stream

    def _part(self, block: ListedBlock, place: Place | None) -> _Placed | None:
        if place is None:
            return None
        core = _core.ffi.new("struct qm_block *")
        core.len, core.pages_offset, core.page_size = block.length, place.offset, self.page_size
        # A page that is less than a unit of direct I/O would be written along with others, which
        # are not on the stage.
        direct = place.direct
        if direct is not None and self.page_size % direct.off_align:
            direct = None
        return _Placed(place, core_file(place.fd, direct), core_file(place.fd, None), core)

    def _new_records(self, seen: Mapping[str, Bitmap]) -> RecordDecoder:
        records = RecordDecoder(self.blocks, self.page_size)
        for record, block in zip(records.core, self.blocks, strict=True):
            if block.name in seen:
                record.staged, record.seen = True, seen[block.name].core
        records.start()
        return records

    def _read_records(self, offset: int) -> int:
        at, fault = _core.ffi.new("int64_t *", offset), _core.ffi.new("struct qm_fault *")
        while True:
            rc = read_body(self.reading, self._records.decoder, self.source, at, fault)
            if rc == _ELSEWHERE:
                self._turn()
            elif rc < 0:
                raise self._failure(rc, fault, int(at[0]))
            else:
                return int(at[0])

    def _failure(self, rc: int, fault: Any, at: int) -> PyqmigrateError:
        if fault.in_memory and rc != -errno.EBADMSG:  # which is our own file
            fault.in_memory = 0
            return failure(rc, fault, self.target, self.blocks[fault.block].name)
        return self._records.failure(rc, fault, self.source, at)

    # ---- stages ----

    def _turn(self) -> None:
        """Put that part on a stage which the next record is about."""
        off = _core.ffi.new("uint64_t *")
        number = _core.lib.qm_decoder_wants(self._records.decoder, off)
        self._write_current()
        self._put(number, int(off[0]) // _PART * _PART)

    def _put(self, number: int, off: int) -> None:
        for stage in self._stages:  # what the file has of it must be there first
            if stage.part == (number, off):
                self._await(stage)
        stage = self._stages.popleft()
        self._await(stage)
        placed = self._parts[number]
        assert placed is not None
        place, core = placed.place, stage.core
        core.off, core.len = off, min(_PART, self.blocks[number].length - off)
        core.fd, core.at = place.fd, place.offset + off
        core.data = place.bitmap.core + off // self.page_size // 64
        stage.part = (number, off)
        self._visited.add(stage.part)
        _core.lib.qm_decoder_set_staging(self._records.decoder, number, core)
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
        rc: int = _core.lib.qm_write_staging(
            self.channels.core,
            stage.channel,
            placed.file,
            placed.block,
            stage.core,
            self._sparse,
            placed.place.bitmap.core,
            stage.fault,
        )
        if rc < 0:
            raise failure(rc, stage.fault, self.target, self.blocks[number].name)
        return rc

    # ---- afterwards ----

    def _write_unvisited(self) -> None:
        """Where every page is to be written, also those that no record is about."""
        for number, block in enumerate(self.blocks):
            placed = self._parts[number]
            if placed is None:
                continue
            for off in range(0, block.length, _PART):
                if (number, off) not in self._visited:
                    self._put(number, off)
                    self._write_current()

    def _clean(self) -> None:
        """Make the pages that have ceased to hold data zeros in the file too."""
        channel = _core.ffi.gc(_core.lib.qm_channel_create(), _core.lib.qm_channel_destroy)
        fault = _core.ffi.new("struct qm_fault *")
        for number, off in sorted(self._stale):
            placed, block = self._parts[number], self.blocks[number]
            assert placed is not None
            first = off // self.page_size
            npages = min(_PART, block.length - off) // self.page_size
            rc = _core.lib.qm_stale_punch(
                self.channels.core,
                channel,
                placed.buffered,
                placed.block,
                placed.place.bitmap.core,
                first,
                npages,
                fault,
            )
            if rc < 0:
                raise failure(rc, fault, self.target, block.name)


_ELSEWHERE = 2  # what read_body returns when another part has to be on the stage


@dataclass(frozen=True)
class _Placed:
    """A block's place as the core knows it."""

    place: Place
    file: Any
    buffered: Any
    block: Any


class _Stage:
    """Memory for a part of a block, with what the thread needs that writes it."""

    def __init__(self, stack: contextlib.ExitStack, page_size: int) -> None:
        memory = mmap.mmap(-1, _PART, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        stack.callback(unmap, memory)
        memory.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        base = _core.ffi.from_buffer("unsigned char[]", memory, True)
        stack.callback(_core.ffi.release, base)
        words = -(-_PART // page_size // 64)
        self._kept = _core.ffi.new("uint64_t[]", words), _core.ffi.new("uint64_t[]", words)
        self.core = _core.ffi.new("struct qm_staging *")
        self.core.base = base
        self.core.filled, self.core.zeroed = self._kept
        self.channel = _core.ffi.gc(_core.lib.qm_channel_create(), _core.lib.qm_channel_destroy)
        if self.channel == _core.ffi.NULL:
            raise MemoryError
        self.fault = _core.ffi.new("struct qm_fault *")
        self.part: tuple[int, int] = (-1, 0)  # number of the block, and the offset in it
        self.written: Future[int] | None = None
