"""A finished file, opened for reading.

with Snapshot("/snap/guest.mapped") as snapshot:
    print(snapshot.machine, snapshot.blocks["pc.ram"].length)
    first_page = snapshot.blocks["pc.ram"].read(0, 4096)
    snapshot.load({"pc.ram": buffer})
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

from pyqmigrate.argument_types import check_mapping, check_names
from pyqmigrate.core import MemorySource
from pyqmigrate.enums import Format
from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder
from pyqmigrate.format.stream.writer import Stream, parse
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.bitmap_order import find_order
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, SnapshotMemory
from pyqmigrate.io.target import DirectIO, Target
from pyqmigrate.snapshot.base import Block, Located, Snapshot, error_from_errno, locate
from pyqmigrate.snapshot.load.mapped_ram import Clear, LoadReport
from pyqmigrate.snapshot.load.mapped_ram import start_load as start_load_blocks

__all__ = ["MappedRamSnapshot", "MappedRamBlock", "check_bitmap_order", "start_load"]


class MappedRamBlock(Block):
    """One RAM block of a mapped-ram snapshot. Lengths in bytes, offsets absolute in the file."""

    def __init__(self, snapshot: MappedRamSnapshot, layout: BlockLayout) -> None:
        self._snapshot = snapshot
        self.layout = layout
        self.name, self.length, self.page_size = layout.name, layout.length, layout.page_size
        self.address = layout.gpa
        self._bitmap: Bitmap | None = None

    def __repr__(self) -> str:
        return f"<MappedRamBlock {self.name!r}, {self.length} bytes>"

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
                    self._snapshot.source, self.layout, self._snapshot.bitmap_order
                )
            return self._bitmap

    @property
    def data_pages(self) -> int:
        """Pages that the file holds."""
        return self.bitmap.count()

    def memory(self) -> SnapshotMemory:
        if self.external:
            raise self._elsewhere()
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

    def _refused(self, number: int) -> Exception:
        return error_from_errno(number, self._snapshot.source, self.name)

    def _close(self) -> None:
        if self._bitmap is not None:
            self._bitmap.close()
            self._bitmap = None


class MappedRamSnapshot(Snapshot):
    """A mapped-ram snapshot, written by this package or by QEMU 9.0 and later.

    ``target`` is a path, a ``file:`` URI or Descriptors (borrowed, open for reading); ``offset``
    is where the stream starts, for a path. Without one, what libvirt puts before the stream is
    stepped over; it is ``libvirt``, otherwise None. ``bitmap_order`` is the byte order of the host
    that wrote the file, which nothing in it records. Where it is not given, it is ``little``,
    unless a big-endian host is to be expected (an s390 guest) and the file shows that it was one
    (:mod:`pyqmigrate.io.bitmap_order`).

    Opening parses and checks everything but the bitmaps and the pages. Raises SnapshotError for
    a file that is not a whole snapshot, NotSupported for a well-formed stream of another kind,
    TargetError when it cannot be opened. Reads and loads may run in several threads at once;
    close it when they are done.
    """

    format = Format.MAPPED_RAM

    def __init__(
        self,
        target: Target | Located,
        *,
        offset: int | None = None,
        bitmap_order: ByteOrder | None = None,
    ) -> None:
        check_bitmap_order(bitmap_order)
        super().__init__(locate(target, offset))
        self._bitmap_order = bitmap_order
        self._blocks: Mapping[str, MappedRamBlock] = {}
        try:
            if self.source.passing:
                raise NotSupported(
                    "the stream is compressed, so its pages are not at fixed places: decompress it "
                    "into a file, or convert it if it is a sequential stream "
                    "(pyqmigrate convert FILE OUT --to mapped-ram)"
                )
            self._stream = parse(self.source, self.offset)
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
        """The byte order in which bitmaps are read; found out on first use where it was not given.

        Raises TargetError.
        """
        with self._lock:
            if self._bitmap_order is None:
                self._bitmap_order = find_order(self.source, self.stream.blocks, self.machine)
            return self._bitmap_order

    @property
    def machine(self) -> str:
        """The machine type of the guest, perhaps empty."""
        return self._stream.machine

    def verify(self) -> None:
        """Check the structure as far as the format allows; SnapshotError says what is wrong.

        Beyond what opening checks: every bitmap, its bits against the block and the file's size,
        and that the end of the stream is there. The format has no checksums: flipped bits in
        pages cannot be seen.
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
    """UsageError unless it is ``little``, ``big`` or None."""
    if order not in (None, "little", "big"):
        raise UsageError(f"bitmap_order is {order!r}; it is 'little' or 'big'")


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
    snapshot = MappedRamSnapshot(target, offset=offset)
    try:
        return snapshot.start_load(
            memories, channels=channels, direct_io=direct_io, clear=clear
        ).at_end(snapshot.close)
    except BaseException:
        snapshot.close()
        raise
