"""A classic stream, opened for reading at random.

    with ClassicSnapshot("/snap/guest.classic", index="/snap/guest.index") as snapshot:
        first_page = snapshot.blocks["pc.ram"].read(0, 4096)

Opening reads the head only. What asks for more (:attr:`ClassicSnapshot.stream`, reads, page counts,
:meth:`~ClassicSnapshot.verify`) makes one pass over the whole file, once: it finds the sections and
the place of every page (:mod:`pyqmigrate.page_index`), keeps no page, and costs 8 bytes of memory a
page. A load makes a pass of its own and needs no index, as do conversions into a mapped-ram file
and raw files.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from pyqmigrate import _core
from pyqmigrate.errors import BlockMismatch, DirectIORefused, SnapshotError
from pyqmigrate.format.configuration import IGNORE_SHARED
from pyqmigrate.format.sequential import SequentialBlock, SequentialStream, SequentialWalk
from pyqmigrate.io.channels import Channels, Job, Progress, check_channels
from pyqmigrate.io.memory import Memory, StoredMemory
from pyqmigrate.io.target import DirectIO, Target
from pyqmigrate.load import Clear, LoadReport
from pyqmigrate.opened import Kind, Located, OpenedBlock, OpenedSnapshot, locate, refused_read
from pyqmigrate.page_index import PageIndex, check_place, keep, recall
from pyqmigrate.sequential import PolledSource, start_sequential_load
from pyqmigrate.spelling import choice

__all__ = ["ClassicBlock", "ClassicSnapshot"]


class ClassicBlock(OpenedBlock):
    """One RAM block of a classic stream. Lengths in bytes."""

    def __init__(self, snapshot: ClassicSnapshot, entry: SequentialBlock, page_size: int) -> None:
        self._snapshot = snapshot
        self.entry = entry
        self.name, self.length, self.page_size = entry.name, entry.length, page_size

    def __repr__(self) -> str:
        return f"<ClassicBlock {self.name!r}, {self.length} bytes>"

    @property
    def external(self) -> bool:
        """Whether the content is kept in another file: with ``x-ignore-shared`` on, whether no
        record mentions the block."""
        if not self._snapshot.stream.ignore_shared:
            return False
        core = self._snapshot._index().cores[self.name]
        return bool(_core.lib.qm_index_next(core, 0) == self.num_pages)

    @property
    def data_pages(self) -> int:
        """Pages that the stream has with some content."""
        return int(_core.lib.qm_index_count(self._snapshot._index().cores[self.name]))

    def memory(self) -> StoredMemory:
        if self.external:
            raise self._elsewhere()
        indexed = _core.ffi.new("struct qm_indexed *")
        indexed.index = self._snapshot._index().cores[self.name]
        indexed.fd = self._snapshot.source.fd
        return StoredMemory(
            self.length, self.data_pages * self.page_size, self._snapshot.identity,
            _core.ffi.addressof(_core.lib, "qm_indexed_fill"),
            _core.ffi.addressof(_core.lib, "qm_indexed_next"), indexed,
        )

    def runs(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int, bool]]:
        core = self._snapshot._index().cores[self.name]
        end = self.num_pages if end is None else end
        data = _core.ffi.new("int *")
        while first < end:
            stop = int(_core.lib.qm_index_run(core, first, end, data))
            yield first, stop, bool(data[0])
            first = stop

    def _refused(self, number: int) -> Exception:
        return refused_read(number, self._snapshot.source, self.name)


class ClassicSnapshot(OpenedSnapshot[ClassicBlock]):
    """A classic stream: ``migrate`` to ``file:`` or ``exec:`` without mapped-ram.

    target, offset: as for :class:`~pyqmigrate.snapshot.Snapshot`.
    page_size: bytes; needed where neither configuration nor description tells and it is not 4096.
    index: where the result of the pass is kept; it is used if it is whole and of this file, and
        written otherwise. A file there that is no index is a UsageError.

    Raises SnapshotError for a damaged head, NotSupported for a stream of another kind, TargetError,
    UsageError. The pass raises these too, at whatever needed it: NotSupported for a multifd stream,
    whose pages are elsewhere, for compressed pages, and for a page with more than 1024 changes.
    """

    kind = Kind.STREAM

    def __init__(
        self,
        target: Target | Located,
        *,
        offset: int | None = None,
        page_size: int | None = None,
        index: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(locate(target, offset))
        self.index = None if index is None else Path(index)
        self._pass: tuple[SequentialStream, PageIndex] | None = None
        try:
            if self.index is not None:
                check_place(self.index)
            walk = SequentialWalk(self.source, self.offset, _no_records, page_size=page_size)
            walk.read_head()
        except BaseException:
            self.close()
            raise
        self.configuration = walk.configuration
        self.page_size = walk.page_size
        self.head = walk.head
        self._entries = walk.blocks
        self.blocks = MappingProxyType(
            {entry.name: ClassicBlock(self, entry, walk.page_size) for entry in walk.blocks}
        )

    @property
    def machine(self) -> str:
        return self.configuration.machine

    @property
    def stream(self) -> SequentialStream:
        """What the stream says, and its sections; takes the pass."""
        return self.read_through()[0]

    def read_through(
        self, progress: Callable[[Progress], object] | None = None
    ) -> tuple[SequentialStream, PageIndex]:
        """Make the pass if it was not made, and wait; ``progress`` as for a load."""
        _ = self.source  # closed?
        with self._lock:
            if self._pass is None:
                channels = Channels(1, "pyqmigrate-index")
                total = sum(block.length for block in self.blocks.values())
                job = self._follow(Job(channels, total, lambda: self._read(channels)))
                self._pass = job.wait(progress)
            return self._pass

    def _index(self) -> PageIndex:
        return self.read_through()[1]

    def _read(self, channels: Channels) -> tuple[SequentialStream, PageIndex]:
        source, path = self.source, self.index
        if path is not None:
            kept = recall(source, path, self._entries, self.page_size)
            if kept is not None:
                # What does not fit may be the index's fault, or the file's: the pass will tell.
                with contextlib.suppress(SnapshotError):
                    return self._walk(channels, functools.partial(_end, kept)), kept
        index = PageIndex(self._entries, self.page_size)
        stream = self._walk(channels, functools.partial(index.read_records, source, channels))
        if path is not None:
            keep(index, source, path)
        return stream, index

    def _walk(self, channels: Channels, read_records: Callable[[int], int]) -> SequentialStream:
        walk = SequentialWalk(
            PolledSource(self.source, channels), self.offset, read_records, page_size=self.page_size
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
        if choice(DirectIO, direct_io, "direct_io") is DirectIO.ON:
            raise DirectIORefused(
                errno.EINVAL, "a classic stream goes through the page cache", self.source.name
            )
        wanted = {block.name for block in self._known(blocks)}
        given = {n: m for n, m in memories.items() if n in wanted or n not in self.blocks}
        missing = [name for name in self.blocks if name in wanted and name not in given]
        if missing and IGNORE_SHARED not in self.configuration.capabilities:
            raise BlockMismatch(f"no memory is given for block {missing[0]!r}")
        job = start_sequential_load(
            self.source, given, skip_unknown_blocks=True, clear=clear, page_size=self.page_size
        )
        return self._follow(job)  # type: ignore[arg-type]

    def _drop(self) -> None:
        self._pass = None


def _no_records(offset: int) -> int:
    raise SnapshotError("page records stand before the list of RAM blocks", offset=offset)


def _end(index: PageIndex, offset: int) -> int:
    if offset not in index.bodies:
        raise SnapshotError("the index knows no records here", offset=offset)
    return index.bodies[offset]
