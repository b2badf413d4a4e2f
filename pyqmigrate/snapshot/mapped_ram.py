"""A mapped-ram file, opened for reading.

It is what :func:`~pyqmigrate.open_snapshot` returns for such a file::

    with open_snapshot("/snap/guest.mapped") as snapshot:
        print(snapshot.machine, snapshot.blocks["pc.ram"].length)
        first_page = snapshot.blocks["pc.ram"].read(0, 4096)
        snapshot.load({"pc.ram": buffer})
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from pyqmigrate.argument_types import check_mapping, check_names
from pyqmigrate.core import MemorySource
from pyqmigrate.enums import Clear, Format
from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder
from pyqmigrate.format.stream.mapped_ram_reader import parse
from pyqmigrate.format.stream.wire import Stream
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.bitmap_order import find_order
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Block, Snapshot

if TYPE_CHECKING:
    from pyqmigrate.io.job import Job
    from pyqmigrate.io.memory import Memory, SnapshotMemory
    from pyqmigrate.snapshot.load.mapped_ram import LoadReport

__all__ = ["MappedRamSnapshot", "MappedRamBlock", "check_bitmap_order", "start_load"]


class MappedRamBlock(Block):
    """One RAM block of a mapped-ram file."""

    def __init__(self, snapshot: MappedRamSnapshot, layout: BlockLayout) -> None:
        self._snapshot = snapshot
        self._layout = layout
        self.name, self.length, self.page_size = layout.name, layout.length, layout.page_size
        self.address = layout.gpa
        self._bitmap: Bitmap | None = None

    @property
    def snapshot(self) -> MappedRamSnapshot:
        return self._snapshot

    @property
    def layout(self) -> BlockLayout:
        return self._layout

    @property
    def pages_offset(self) -> int:
        return self.layout.pages_offset

    @property
    def bitmap_offset(self) -> int:
        return self.layout.bitmap_offset

    @property
    def external(self) -> bool:
        """Whether the content is stored in another file (``x-ignore-shared``)."""
        return self.layout.external

    @property
    def bitmap(self) -> Bitmap:
        """Which pages have data; read and checked on first use.

        In a background snapshot of QEMU's, which has no bitmaps, those that are not in a hole of the
        file. Raises SnapshotError for bits past the end of the block or of the file.
        """
        with self._snapshot._lock:
            if self._bitmap is None:
                self._bitmap = self._read_bitmap()
            return self._bitmap

    def _read_bitmap(self) -> Bitmap:
        source = self._snapshot.source
        bitmap = Bitmap.read_from(source, self.layout, self._snapshot.bitmap_order)
        if not self._snapshot.stream.background or self.external:
            return bitmap
        with contextlib.closing(bitmap):
            if bitmap.last() >= 0:
                raise SnapshotError(
                    "a file without RAM END is complete only as a background snapshot, whose bitmaps"
                    " are empty; this one is not",
                    offset=self.bitmap_offset,
                    block=self.name,
                    field="bitmap",
                )
        return Bitmap.of_extents(source.fd, self.layout)

    @property
    def data_pages(self) -> int:
        """Pages with data."""
        return self.bitmap.count()

    def memory(self) -> SnapshotMemory:
        if self.external:
            raise self._elsewhere()
        from pyqmigrate.io.memory import SnapshotMemory

        source = MemorySource.mapped_ram(
            self.bitmap, self.num_pages, self.pages_offset, self.page_size, self._snapshot.source.fd
        )
        return SnapshotMemory(
            self.length, self.data_pages * self.page_size, self._snapshot.identity, source
        )

    def runs(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int, bool]]:
        end = self.num_pages if end is None else end
        while first < end:
            stop = self.bitmap.run_end(first, end)
            yield first, stop, self.bitmap[first]
            first = stop

    def _close(self) -> None:
        if self._bitmap is not None:
            self._bitmap.close()
            self._bitmap = None


class MappedRamSnapshot(Snapshot):
    """A mapped-ram file, written by this package or by QEMU 9.0 and later.

    ``bitmap_order`` is the byte order of the host that wrote the file, which the file does not
    record. By default it is ``little``, unless the guest suggests a big-endian host (an s390 guest)
    and the file confirms it (:mod:`pyqmigrate.io.bitmap_order`).

    ``stream.background``: QEMU wrote it as a background snapshot, in the mode in which it leaves out
    the bitmaps and RAM's END. All of this class works on such a file, as long as it is a regular
    one, but QEMU would load it as zeros: convert it to mapped-ram first.

    Opening parses and checks everything except the bitmaps and the pages. Raises SnapshotError for
    a file that is not a complete snapshot, NotSupported for a well-formed stream of another kind.
    """

    format = Format.MAPPED_RAM

    def __init__(self, stream_file: StreamFile, *, bitmap_order: ByteOrder | None = None) -> None:
        super().__init__(stream_file)
        self._bitmap_order: ByteOrder | None = bitmap_order
        self._blocks: Mapping[str, MappedRamBlock] = {}
        try:
            check_bitmap_order(bitmap_order)
            if stream_file.increment is not None:
                raise UsageError(
                    f"{self.source.name!r} is an increment: open it with open_snapshot()"
                )
            if self.source.forward:
                raise NotSupported(
                    f"a mapped-ram file has its pages at fixed places, and {self.source.name!r} is "
                    "read front to back: put it into a file, decompressed"
                )
            self._stream = parse(self.source, self.offset, stream_file.start)
            if self._stream.background and self.source.is_device:
                raise NotSupported(
                    "a background snapshot without bitmaps on a block device: which of its pages are"
                    " zeros is only known of a regular file, by its holes"
                )
        except BaseException:
            self.close()
            raise
        self._blocks = MappingProxyType(
            {layout.name: MappedRamBlock(self, layout) for layout in self.stream.blocks}
        )

    @property
    def stream(self) -> Stream:
        return self._stream

    @property
    def bitmap_order(self) -> ByteOrder:
        """The byte order in which bitmaps are read; determined on first use if it was not given.

        Raises TargetError.
        """
        with self._lock:
            if self._bitmap_order is None:
                self._bitmap_order = find_order(self.source, self.stream.blocks, self.machine)
            return self._bitmap_order

    @property
    def layouts(self) -> tuple[BlockLayout, ...]:
        return self._stream.blocks

    @property
    def machine(self) -> str:
        return self._stream.machine

    def verify(self) -> None:
        """Check the structure as far as the format allows. Raises SnapshotError.

        In addition to the checks of opening: every bitmap, its bits against the block and the
        file's size, and the end of the stream. The format has no checksums, so flipped bits in
        pages are not detected.
        """
        if not self.stream.complete:
            raise SnapshotError(
                "the end of the stream is missing: device state is cut off", offset=self.stream.end
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
        from pyqmigrate.snapshot.load.mapped_ram import start_load as start_load_blocks

        check_mapping("memories", memories)
        check_names("blocks", blocks)
        chosen = [self.blocks[name] for name in self._known(blocks)]
        chosen = [block for block in chosen if not block.external]
        given = {
            name: memory
            for name, memory in memories.items()
            if name not in self.blocks or not self.blocks[name].external
        }
        return self._follow(
            start_load_blocks(
                self.source,
                [(block.layout, block.bitmap) for block in chosen],
                given,
                channels=channels,
                direct_io=direct_io,
                clear=clear,
            )
        )

    @property
    def blocks(self) -> Mapping[str, MappedRamBlock]:
        return self._blocks

    def _drop(self) -> None:
        for block in self._blocks.values():
            block._close()


def check_bitmap_order(order: object) -> None:
    """Raise UsageError unless it is ``little``, ``big`` or None."""
    if order not in (None, "little", "big"):
        raise UsageError(f"bitmap_order must be 'little' or 'big', not {order!r}")


def start_load(
    target: Target,
    memories: Mapping[str, Memory],
    *,
    offset: int | None = None,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    clear: Clear | str = Clear.ZERO,
) -> Job[LoadReport]:
    """Open a mapped-ram file and start to load it; it is closed when the job ends.

    An increment is loaded with its base. Arguments and errors are those of
    :meth:`~pyqmigrate.snapshot.base.Snapshot.load`.
    """
    snapshot = _open(StreamFile.open(target, offset=offset))
    try:
        return snapshot.start_load(
            memories, channels=channels, direct_io=direct_io, clear=clear
        ).at_end(snapshot.close)
    except BaseException:
        snapshot.close()
        raise


def _open(stream_file: StreamFile) -> Snapshot:
    if stream_file.increment is None:
        return MappedRamSnapshot(stream_file)
    from pyqmigrate.snapshot.increment import IncrementSnapshot

    return IncrementSnapshot(stream_file)
