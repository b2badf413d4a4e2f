"""A sequential stream, opened for reading at random.

    with open_snapshot("/snap/guest.sequential", index="/snap/guest.index") as snapshot:
        first_page = snapshot.blocks["pc.ram"].read(0, 4096)

Opening reads the head only. :attr:`SequentialSnapshot.stream`, page counts and
:meth:`~SequentialSnapshot.verify` make one pass over the whole file, once: it finds the sections,
keeps no page, and needs two bits of memory for each page. Reading pages makes a pass that finds the
place of every page too (:mod:`pyqmigrate.snapshot.page_index`), and needs 8 bytes for each. A load
makes a pass of its own and needs no index, as do conversions into a mapped-ram file or raw files.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pyqmigrate.argument_types import check, check_mapping, check_names
from pyqmigrate.core import MemorySource
from pyqmigrate.enums import Clear, Format, parse_enum
from pyqmigrate.errors import (
    BlockMismatch,
    DirectIORefused,
    NotSupported,
    SnapshotError,
    UsageError,
)
from pyqmigrate.format.stream.configuration import IGNORE_SHARED
from pyqmigrate.format.stream.sequential import (
    ListedBlock,
    SequentialStream,
    SequentialStreamReader,
)
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, check_channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.in_use import FileId, files_in_use, refuse_in_use
from pyqmigrate.io.input import Source
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.memory import Memory, SnapshotMemory
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.base import Block, Snapshot
from pyqmigrate.snapshot.load.mapped_ram import LoadReport
from pyqmigrate.snapshot.load.sequential import start_sequential_load
from pyqmigrate.snapshot.load.staging import StreamUnpacker
from pyqmigrate.snapshot.page_index import PageIndex, check_place, keep, recall
from pyqmigrate.snapshot.records import PolledSource, RecordDecoder

__all__ = ["SequentialBlock", "SequentialSnapshot"]


class SequentialBlock(Block):
    """One RAM block of a sequential stream."""

    def __init__(self, snapshot: SequentialSnapshot, entry: ListedBlock, page_size: int) -> None:
        self._snapshot = snapshot
        self.entry = entry
        self.name, self.length, self.page_size = entry.name, entry.length, page_size
        self.address = entry.gpa

    @property
    def snapshot(self) -> SequentialSnapshot:
        return self._snapshot

    @property
    def external(self) -> bool:
        """Whether the content is stored in another file: with ``x-ignore-shared`` on, whether no
        record mentions the block."""
        return self._snapshot.stream.ignore_shared and not self._counted.mentioned

    @property
    def data_pages(self) -> int:
        """Pages with data in the stream."""
        return self._counted.data_pages

    @property
    def _counted(self) -> _Counted:
        return self._snapshot._counts()[self.name]

    def memory(self) -> SnapshotMemory:
        if self.external:
            raise self._elsewhere()
        index = self._snapshot.page_index().of[self.name]
        return SnapshotMemory(
            self.length,
            self.data_pages * self.page_size,
            self._snapshot.identity,
            MemorySource.sequential(index, self._snapshot.source.fd),
        )

    def runs(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int, bool]]:
        index = self._snapshot.page_index().of[self.name]
        end = self.num_pages if end is None else end
        while first < end:
            stop, data = index.run(first, end)
            yield first, stop, data
            first = stop


class SequentialSnapshot(Snapshot):
    """A sequential stream: ``migrate`` to ``file:`` or ``exec:`` without mapped-ram.

    page_size: bytes; needed if neither configuration nor description states it and it is not 4096.
    index: the file that stores the result of the pass. It is used if it is intact and belongs to
        this file, and written otherwise. Another file there is a UsageError.

    Raises SnapshotError for a damaged head, NotSupported for a stream of another kind, TargetError,
    UsageError. Whatever needs the pass raises these too: NotSupported for a multifd stream, whose
    pages are elsewhere, and for compressed pages; for random reads, also for a page with more than
    1024 changes, and for a forward-only source.
    """

    format = Format.SEQUENTIAL
    one_pass = True

    def __init__(
        self,
        stream_file: StreamFile,
        *,
        page_size: int | None = None,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(stream_file)
        self.index: Path | None = None
        self._walked: tuple[SequentialStream, Mapping[str, _Counted]] | None = None
        self._pages: PageIndex | None = None
        try:
            source = self.source
            check("page_size", page_size, int, type(None))
            check("index", index, str, os.PathLike, type(None))
            if index is not None:
                place = check_place(index)
                refuse_in_use(place, self.in_use())
                self.index = place
                self.makes_index = True
            walk = SequentialStreamReader(
                source, self.offset, _no_records, page_size=page_size, run_out=source.run_out
            )
            if self.index is not None and source.forward:
                raise UsageError(
                    f"{source.name!r} is read front to back: an index of it has no use"
                )
            if self.index is not None and source.is_device:
                raise UsageError(
                    f"{source.name!r} is a block device, which records no time of change: no index "
                    "can be kept"
                )
            walk.read_head(stream_file.start)
        except BaseException:
            self.close()
            raise
        self.configuration = walk.configuration
        self.page_size = walk.page_size
        self.head = walk.head
        self._entries = walk.blocks
        self._blocks = MappingProxyType(
            {entry.name: SequentialBlock(self, entry, walk.page_size) for entry in walk.blocks}
        )

    def in_use(self) -> dict[FileId, str]:
        index = [] if self.index is None else [(self.index, "the index of the snapshot")]
        return super().in_use() | files_in_use(index)

    @property
    def blocks(self) -> Mapping[str, SequentialBlock]:
        return self._blocks

    @property
    def machine(self) -> str:
        return self.configuration.machine

    @property
    def stream(self) -> SequentialStream:
        """The configuration of the stream, its blocks and its sections; makes the pass."""
        return self.read_through()

    def read_through(
        self, progress: Callable[[Progress], object] | None = None
    ) -> SequentialStream:
        """Make the pass unless it was made, wait for it, and return :attr:`stream`.

        If there is to be an index, this makes it.
        """
        return self._pass(progress, pages=self.index is not None)

    def prepare_random_reads(self, progress: Callable[[Progress], object] | None = None) -> None:
        self._pass(progress, pages=True)

    def unpacker(self, channels: Channels, sparse: Any, target: str) -> StreamUnpacker:
        return StreamUnpacker(self.stream_file, channels, sparse, target, page_size=self.page_size)

    def _pass(
        self, progress: Callable[[Progress], object] | None, *, pages: bool
    ) -> SequentialStream:
        _ = self.source  # raises if the snapshot is closed
        walked = self._walked
        if walked is not None and not (pages and self._pages is None):
            return walked[0]
        with self._lock:
            if self._walked is None or (pages and self._pages is None):
                channels = Channels(1, "pyqmigrate-index")
                total = sum(block.length for block in self.blocks.values())
                read = self._find_pages if pages else self._count_pages
                self._follow(Job(channels, total, lambda: read(channels))).wait(progress)
            assert self._walked is not None
            return self._walked[0]

    def _counts(self) -> Mapping[str, _Counted]:
        self.read_through()
        assert self._walked is not None
        return self._walked[1]

    def page_index(self) -> PageIndex:
        """Return where every page is; makes the pass that finds it."""
        if self._pages is None:
            self.prepare_random_reads()
        assert self._pages is not None
        return self._pages

    def _count_pages(self, channels: Channels) -> None:
        with contextlib.closing(_PageCount(self._entries, self.page_size)) as count:
            stream = self._walk(channels, functools.partial(count.read, self.source, channels))
            self._walked = stream, count.found()

    def _find_pages(self, channels: Channels) -> None:
        source, path = self.source, self.index
        if source.forward:
            raise NotSupported(
                f"pages of {source.name!r} cannot be read at random: it is read front to back; "
                "convert it into a mapped-ram file"
            )
        if path is not None:
            kept = recall(self.stream_file, path, self._entries, self.page_size)
            if kept is not None:
                # A mismatch may be the index's fault, or the file's: the pass decides.
                with contextlib.suppress(SnapshotError):
                    self._take(self._walk(channels, functools.partial(_end, kept)), kept)
                    return
        index = PageIndex(self._entries, self.page_size)
        stream = self._walk(channels, functools.partial(index.read_records, source, channels))
        if path is not None:
            keep(index, self.stream_file, path)
        self._take(stream, index)

    def _take(self, stream: SequentialStream, index: PageIndex) -> None:
        self._pages = index
        self._walked = (
            stream,
            {
                name: _Counted(block.next(0) < block.npages, block.data_pages())
                for name, block in index.of.items()
            },
        )

    def _walk(self, channels: Channels, read_records: Callable[[int], int]) -> SequentialStream:
        polled = PolledSource(self.source, channels)
        walk = SequentialStreamReader(
            polled, self.offset, read_records, page_size=self.page_size, run_out=polled.run_out
        )
        walk.read_head(self.stream_file.start)
        return walk.stream()

    def verify(self) -> None:
        """Check the structure: every record, and the end of the stream. Raises SnapshotError.

        The format has no checksums, so flipped bits in pages are not detected.
        """
        stream = self.stream
        if not stream.complete:
            raise SnapshotError(
                "the end of the stream is missing: device state is cut off", offset=stream.end
            )

    def start_load(
        self,
        memories: Mapping[str, Memory],
        *,
        channels: int = 2,
        direct_io: DirectIO | str = DirectIO.AUTO,
        clear: Clear | str = Clear.ZERO,
        blocks: Collection[str] | None = None,
    ) -> Job[LoadReport]:
        check_channels(channels)
        check_mapping("memories", memories)
        check_names("blocks", blocks)
        if parse_enum(DirectIO, direct_io, "direct_io") is DirectIO.ON:
            raise DirectIORefused(
                errno.EINVAL, "a sequential stream goes through the page cache", self.source.name
            )
        wanted = set(self._known(blocks))
        given = {n: m for n, m in memories.items() if n in wanted or n not in self.blocks}
        missing = [name for name in self.blocks if name in wanted and name not in given]
        if missing and IGNORE_SHARED not in self.configuration.capabilities:
            raise BlockMismatch(f"no memory is given for block {missing[0]!r}")
        job = start_sequential_load(
            self.stream_file, given, skip_unknown_blocks=True, clear=clear, page_size=self.page_size
        )
        return self._follow(job)

    def _drop(self) -> None:
        self._walked = self._pages = None


@dataclass(frozen=True)
class _Counted:
    """Whether any record mentions a block, and how many of its pages have data."""

    mentioned: bool
    data_pages: int


class _PageCount:
    """Check and count records, at two bits for each page."""

    def __init__(self, blocks: Sequence[ListedBlock], page_size: int) -> None:
        self._records = RecordDecoder(blocks, page_size)
        self._blocks = blocks
        self._bitmaps: list[tuple[Bitmap, Bitmap]] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for number, block in enumerate(blocks):
                npages = block.length // page_size
                seen, content = Bitmap(npages), Bitmap(npages)
                self._bitmaps.append((seen, content))
                self._records.mark_content(number, content, seen)
            self._records.start()
            stack.pop_all()

    def read(self, source: Source, channels: Channels, offset: int) -> int:
        return self._records.read(source, channels, offset)

    def found(self) -> dict[str, _Counted]:
        return {
            block.name: _Counted(seen.last() >= 0, content.count())
            for block, (seen, content) in zip(self._blocks, self._bitmaps, strict=True)
        }

    def close(self) -> None:
        for pair in self._bitmaps:
            for bitmap in pair:
                bitmap.close()


def _no_records(offset: int) -> int:
    raise SnapshotError("page records before the list of RAM blocks", offset=offset)


def _end(index: PageIndex, offset: int) -> int:
    if offset not in index.bodies:
        raise SnapshotError("the index has no records at this offset", offset=offset)
    return index.bodies[offset]
