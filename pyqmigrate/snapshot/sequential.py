"""A sequential stream, opened for reading at random.

    with SequentialSnapshot("/snap/guest.sequential", index="/snap/guest.index") as snapshot:
        first_page = snapshot.blocks["pc.ram"].read(0, 4096)

Opening reads the head only. What asks for more (:attr:`SequentialSnapshot.stream`, page counts,
:meth:`~SequentialSnapshot.verify`) makes one pass over the whole file, once: it finds the sections,
keeps no page, and costs two bits of memory a page. What reads pages makes one that finds the place
of every page too (:mod:`pyqmigrate.snapshot.page_index`), and costs 8 bytes a page. A load makes a
pass of its own and needs no index, as do conversions into a mapped-ram file or raw files.
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

from pyqmigrate.argument_types import check, check_mapping, check_names
from pyqmigrate.core import MemorySource
from pyqmigrate.enums import Format, parse_enum
from pyqmigrate.errors import (
    BlockMismatch,
    DirectIORefused,
    NotSupported,
    SnapshotError,
    UsageError,
)
from pyqmigrate.format.stream.configuration import IGNORE_SHARED
from pyqmigrate.format.stream.sequential import ListedBlock, SequentialStream, SequentialWalk
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, check_channels
from pyqmigrate.io.in_use import FileId, files_in_use, refuse_in_use
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.memory import Memory, SnapshotMemory
from pyqmigrate.io.pipe import ForwardInput
from pyqmigrate.io.target import DirectIO, InputFile, Target
from pyqmigrate.snapshot.base import Block, Located, Snapshot, error_from_errno, locate
from pyqmigrate.snapshot.load.mapped_ram import Clear, LoadReport
from pyqmigrate.snapshot.load.sequential import PolledSource, RecordDecoder, start_sequential_load
from pyqmigrate.snapshot.page_index import PageIndex, check_place, keep, recall

__all__ = ["SequentialBlock", "SequentialSnapshot"]


class SequentialBlock(Block):
    """One RAM block of a sequential stream. Lengths in bytes."""

    def __init__(self, snapshot: SequentialSnapshot, entry: ListedBlock, page_size: int) -> None:
        self._snapshot = snapshot
        self.entry = entry
        self.name, self.length, self.page_size = entry.name, entry.length, page_size
        self.address = entry.gpa

    def __repr__(self) -> str:
        return f"<SequentialBlock {self.name!r}, {self.length} bytes>"

    @property
    def external(self) -> bool:
        """Whether the content is kept in another file: with ``x-ignore-shared`` on, whether no
        record mentions the block."""
        return self._snapshot.stream.ignore_shared and not self._counted.mentioned

    @property
    def data_pages(self) -> int:
        """Pages that the stream has with some content."""
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

    def _refused(self, number: int) -> Exception:
        return error_from_errno(number, self._snapshot.source, self.name)


class SequentialSnapshot(Snapshot):
    """A sequential stream: ``migrate`` to ``file:`` or ``exec:`` without mapped-ram.

    target, offset: as for :class:`~pyqmigrate.snapshot.mapped_ram.MappedRamSnapshot`.
    page_size: bytes; needed where neither configuration nor description tells and it is not 4096.
    index: where the result of the pass is kept; it is used if it is whole and of this file, and
        written otherwise. A file there that is no index is a UsageError.

    Raises SnapshotError for a damaged head, NotSupported for a stream of another kind, TargetError,
    UsageError. The pass raises these too, at whatever needed it: NotSupported for a multifd stream,
    whose pages are elsewhere, and for compressed pages; where pages are read at random, also for a
    page with more than 1024 changes, and for a stream that is not in a file as it is.
    """

    format = Format.SEQUENTIAL

    def __init__(
        self,
        target: Target | Located,
        *,
        offset: int | None = None,
        page_size: int | None = None,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        check("page_size", page_size, int, type(None))
        check("index", index, str, os.PathLike, type(None))
        super().__init__(locate(target, offset))
        self.index: Path | None = None
        self._walked: tuple[SequentialStream, Mapping[str, _Counted]] | None = None
        self._pages: PageIndex | None = None
        try:
            source = self.source
            if index is not None:
                place = check_place(index)
                refuse_in_use(place, self.in_use())
                self.index = place
            walk = SequentialWalk(
                source,
                self.offset,
                _no_records,
                page_size=page_size,
                run_out=source.run_out if isinstance(source, ForwardInput) else None,
            )
            if self.index is not None and source.passing:
                raise UsageError(f"{source.name!r} is not read at random: no index can be kept")
            if self.index is not None and source.is_device:
                raise UsageError(
                    f"{source.name!r} is a block device, which records no time of change: no index "
                    "can be kept"
                )
            walk.read_head()
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
        """What the stream says, and its sections; takes the pass."""
        return self.read_through()

    def read_through(
        self, progress: Callable[[Progress], object] | None = None, *, pages: bool = False
    ) -> SequentialStream:
        """Make the pass if it was not made, and wait; ``progress`` as for a load.

        ``pages``: also note where every page is, so that they can be read at random.
        """
        _ = self.source  # closed?
        pages = pages or self.index is not None
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
        """Where every page is; takes the pass that finds out."""
        if self._pages is None:
            self.read_through(pages=True)
        assert self._pages is not None
        return self._pages

    def _count_pages(self, channels: Channels) -> None:
        with contextlib.closing(_PageCount(self._entries, self.page_size)) as count:
            stream = self._walk(channels, functools.partial(count.read, self.source, channels))
            self._walked = stream, count.found()

    def _find_pages(self, channels: Channels) -> None:
        source, path = self.source, self.index
        if source.passing:
            raise NotSupported(
                f"pages of {source.name!r} cannot be read at random: it is read front to back; "
                "convert it into a mapped-ram file"
            )
        if path is not None:
            kept = recall(source, path, self._entries, self.page_size)
            if kept is not None:
                # What does not fit may be the index's fault, or the file's: the pass will tell.
                with contextlib.suppress(SnapshotError):
                    self._take(self._walk(channels, functools.partial(_end, kept)), kept)
                    return
        index = PageIndex(self._entries, self.page_size)
        stream = self._walk(channels, functools.partial(index.read_records, source, channels))
        if path is not None:
            keep(index, source, path)
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
        walk = SequentialWalk(
            polled, self.offset, read_records, page_size=self.page_size, run_out=polled.run_out
        )
        walk.read_head()
        return walk.stream()

    def verify(self) -> None:
        """Check the structure: every record, and that the end of the stream is there.

        Raises SnapshotError. The format has no checksums: flipped bits in pages cannot be seen.
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
            self.source, given, skip_unknown_blocks=True, clear=clear, page_size=self.page_size
        )
        return self._follow(job)

    def _drop(self) -> None:
        self._walked = self._pages = None


@dataclass(frozen=True)
class _Counted:
    """Whether any record is about a block, and how many of its pages hold something."""

    mentioned: bool
    data_pages: int


class _PageCount:
    """Records that are checked and counted, at two bits a page."""

    def __init__(self, blocks: Sequence[ListedBlock], page_size: int) -> None:
        with contextlib.ExitStack() as stack:
            self._records = RecordDecoder(blocks, page_size)
            self._bitmaps = {}
            for number, block in enumerate(blocks):
                seen, content = pair = [Bitmap(block.length // page_size) for _ in range(2)]
                self._bitmaps[block.name] = pair
                for bitmap in pair:
                    stack.callback(bitmap.close)
                self._records.mark_content(number, content, seen)
            self._records.start()
            self.close = stack.pop_all().close

    def read(self, source: InputFile, channels: Channels, offset: int) -> int:
        return self._records.read(source, channels, offset)

    def found(self) -> dict[str, _Counted]:
        return {
            name: _Counted(seen.last() >= 0, content.count())
            for name, (seen, content) in self._bitmaps.items()
        }


def _no_records(offset: int) -> int:
    raise SnapshotError("page records stand before the list of RAM blocks", offset=offset)


def _end(index: PageIndex, offset: int) -> int:
    if offset not in index.bodies:
        raise SnapshotError("the index knows no records here", offset=offset)
    return index.bodies[offset]
