"""A finished file, opened for reading.

    with Snapshot("/snap/guest.mapped") as snapshot:
        print(snapshot.machine, snapshot.blocks["pc.ram"].length)
        first_page = snapshot.blocks["pc.ram"].read(0, 4096)
        snapshot.load({"pc.ram": buffer})
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType, TracebackType
from typing import Literal, Self

from pyqmigrate.errors import BlockMismatch, SnapshotError, UsageError
from pyqmigrate.format.mapped_ram import BlockLayout
from pyqmigrate.format.stream import Stream, parse
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Job, Progress
from pyqmigrate.io.memory import Memory
from pyqmigrate.io.target import Descriptors, DirectIO, InputTarget, Target
from pyqmigrate.load import Clear, LoadReport
from pyqmigrate.load import start_load as start_load_blocks

__all__ = ["Snapshot", "SnapshotBlock", "start_load"]


class SnapshotBlock:
    """One RAM block of a snapshot. Lengths in bytes, offsets absolute in the file."""

    def __init__(self, snapshot: Snapshot, layout: BlockLayout) -> None:
        self._snapshot = snapshot
        self.layout = layout
        self._bitmap: Bitmap | None = None

    def __repr__(self) -> str:
        return f"<SnapshotBlock {self.name!r}, {self.length} bytes>"

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def length(self) -> int:
        return self.layout.length

    @property
    def page_size(self) -> int:
        return self.layout.page_size

    @property
    def num_pages(self) -> int:
        return self.layout.num_pages

    @property
    def pages_offset(self) -> int:
        return self.layout.pages_offset

    @property
    def bitmap_offset(self) -> int:
        return self.layout.bitmap_offset

    @property
    def external(self) -> bool:
        """Whether the content is kept in another file (``x-ignore-shared``)."""
        return self.layout.external

    @property
    def bitmap(self) -> Bitmap:
        """Which pages the file holds; read and checked on first use.

        Raises SnapshotError when bits point past the end of the block or of the file.
        """
        with self._snapshot._lock:
            if self._bitmap is None:
                self._bitmap = Bitmap.read_from(
                    self._snapshot._open_source(), self.layout, self._snapshot._bitmap_order
                )
            return self._bitmap

    @property
    def data_pages(self) -> int:
        """Pages that the file holds."""
        return self.bitmap.count()

    @property
    def zero_pages(self) -> int:
        """Pages that the file says are zero; an external block has pages of neither kind."""
        return 0 if self.external else self.num_pages - self.data_pages

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes of guest memory from byte ``offset`` of the block.

        Pages whose bit is clear are zeros, whatever the file has there. UsageError outside the
        block, SnapshotError when the file has become shorter.
        """
        if offset < 0 or length < 0 or offset + length > self.length:
            raise UsageError(
                f"bytes {offset} to {offset + length} are not inside block {self.name!r} "
                f"of {self.length} bytes"
            )
        if self.external:
            raise UsageError(f"the content of block {self.name!r} is not in this file")
        if length == 0:
            return b""
        page = self.page_size
        source = self._snapshot._open_source()
        parts = []
        end = offset + length
        for first, last, present in self.bitmap.runs(offset // page, -(-end // page)):
            start, stop = max(first * page, offset), min(last * page, end)
            if not present:
                parts.append(bytes(stop - start))
                continue
            at = self.pages_offset + start
            data = source.read_at(at, stop - start)
            if len(data) != stop - start:
                raise SnapshotError(
                    "the file ends within a page that is marked as present: truncated",
                    offset=at + len(data), block=self.name, field="pages",
                )
            parts.append(data)
        return b"".join(parts)

    def _close(self) -> None:
        if self._bitmap is not None:
            self._bitmap.close()
            self._bitmap = None


class Snapshot:
    """A mapped-ram snapshot, written by this package or by QEMU 9.0 and later.

    ``target`` is a path, a ``file:`` URI or Descriptors (borrowed, open for reading); ``offset``
    is where the stream starts, for a path. ``bitmap_order`` is the byte order of the host that
    wrote the file: only big-endian hosts (s390x) need it, and nothing in the file tells.

    Opening parses and checks everything but the bitmaps and the pages. Raises SnapshotError for
    a file that is not a whole snapshot, NotSupported for a well-formed stream of another kind,
    TargetError when it cannot be opened. Reads and loads may run in several threads at once;
    close it when they are done.
    """

    def __init__(
        self,
        target: Target,
        *,
        offset: int | None = None,
        bitmap_order: Literal["little", "big"] = "little",
    ) -> None:
        if bitmap_order not in ("little", "big"):
            raise UsageError(f"bitmap_order is {bitmap_order!r}; it is 'little' or 'big'")
        self._lock = threading.RLock()
        self._jobs: list[Job[LoadReport]] = []
        self._bitmap_order = bitmap_order
        self._source: InputTarget | None = InputTarget(target)
        try:
            if offset is not None:
                if isinstance(target, Descriptors) or self._source.offset:
                    raise UsageError("the offset is given twice")
                if not 0 <= offset < 1 << 63:
                    raise UsageError(f"offset {offset} is not a file position")
                self._source.offset = offset
            self.stream: Stream = parse(self._source, self._source.offset)
        except BaseException:
            self.close()
            raise
        self.blocks: Mapping[str, SnapshotBlock] = MappingProxyType(
            {layout.name: SnapshotBlock(self, layout) for layout in self.stream.blocks}
        )

    @property
    def machine(self) -> str:
        """The machine type of the guest, perhaps empty."""
        return self.stream.machine

    @property
    def offset(self) -> int:
        """Where the stream starts in the file, bytes."""
        return self._open_source().offset

    @property
    def size(self) -> int:
        """Apparent size of the file, bytes."""
        return self._open_source().size

    @property
    def allocated(self) -> int:
        """Bytes of disk that the file holds."""
        return self._open_source().allocated_bytes()

    def verify(self) -> None:
        """Check the structure as far as the format allows; SnapshotError says what is wrong.

        Beyond what opening checks: every bitmap, its bits against the block and the file's size,
        and that the end of the stream is there. The format has no checksums: flipped bits in
        pages cannot be seen.
        """
        if not self.stream.complete:
            raise SnapshotError(
                "the end of the stream is missing: device state is cut off",
                offset=self.stream.end,
            )
        for block in self.blocks.values():
            _ = block.bitmap

    def start_load(
        self,
        memories: Mapping[str, Memory],
        *,
        channels: int = 2,
        direct_io: DirectIO | str = DirectIO.AUTO,
        clear: Clear | str = Clear.ZERO,
        blocks: Collection[str] | None = None,
    ) -> Job[LoadReport]:
        """Begin to load every block into the memory of its name; returns at once.

        Arguments and errors as :meth:`load`. To close the snapshot cancels the job.
        """
        chosen = self._chosen(blocks)
        given = {
            name: memory for name, memory in memories.items()
            if name not in self.blocks or not self.blocks[name].external
        }
        job = start_load_blocks(
            self._open_source(), [(block.layout, block.bitmap) for block in chosen], given,
            channels=channels, direct_io=direct_io, clear=clear,
        )
        self._jobs.append(job)
        return job.at_end(lambda: self._jobs.remove(job))

    def _chosen(self, names: Collection[str] | None) -> list[SnapshotBlock]:
        unknown = [name for name in names or () if name not in self.blocks]
        if unknown:
            names = [*self.blocks]
            raise BlockMismatch(f"the snapshot has no block {unknown[0]!r}; it has {names}")
        return [
            block for name, block in self.blocks.items()
            if not block.external and (names is None or name in names)
        ]

    def load(
        self,
        memories: Mapping[str, Memory],
        *,
        channels: int = 2,
        direct_io: DirectIO | str = DirectIO.AUTO,
        clear: Clear | str = Clear.ZERO,
        blocks: Collection[str] | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> LoadReport:
        """Load every block into the memory of its name and wait.

        memories: a writable buffer or FileMemory for each block, of just its length; blocks whose
            content is in another file need none.
        channels: threads that move pages, 1 to 255.
        direct_io: whether to read past the page cache.
        clear: whether pages whose bit is clear are made zero, or left as they are.
        blocks: the names of the blocks to load; None is all of them.
        progress: called on this thread at most ten times a second; what it raises cancels.

        Raises BlockMismatch (a ValueError) for unknown, missing or mis-sized memories,
        SnapshotError for a damaged file, GuestMemoryError, TargetError, Cancelled. What was
        loaded before a failure stays in the memories.
        """
        return self.start_load(
            memories, channels=channels, direct_io=direct_io, clear=clear, blocks=blocks
        ).wait(progress)

    def _open_source(self) -> InputTarget:
        if self._source is None:
            raise UsageError("the snapshot is closed")
        return self._source

    def close(self) -> None:
        """Cancel the loads under way, close the file and drop the bitmaps. May be repeated."""
        for job in list(self._jobs):
            job.cancel()
            job.join()
        with self._lock:
            if self._source is not None:
                self._source.close()
                self._source = None
            for block in getattr(self, "blocks", {}).values():
                block._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def start_load(
    target: Target,
    memories: Mapping[str, Memory],
    *,
    offset: int | None = None,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    clear: Clear | str = Clear.ZERO,
) -> Job[LoadReport]:
    """Open a snapshot and begin to load it; it is closed when the job ends. See Snapshot.load."""
    snapshot = Snapshot(target, offset=offset)
    try:
        return snapshot.start_load(
            memories, channels=channels, direct_io=direct_io, clear=clear
        ).at_end(snapshot.close)
    except BaseException:
        snapshot.close()
        raise
