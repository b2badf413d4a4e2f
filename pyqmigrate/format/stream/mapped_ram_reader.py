"""Reading a mapped-ram stream: its RAM sections, and a check that no two regions overlap."""

from __future__ import annotations

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.cursor import ByteSource
from pyqmigrate.format.stream import mapped_ram
from pyqmigrate.format.stream.configuration import IGNORE_SHARED, MAPPED_RAM
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.format.stream.reader import StreamReader
from pyqmigrate.format.stream.start import StreamStart
from pyqmigrate.format.stream.wire import Stream

__all__ = ["parse", "read_layouts"]


def parse(source: ByteSource, offset: int = 0, start: StreamStart | None = None) -> Stream:
    """Parse and check the mapped-ram stream that starts at absolute ``offset`` (bytes).

    ``start`` is its configuration, if that has been read already.

    Every length, offset, count and page size is checked before it is used: against the file's
    size, against its limits, and against each other, down to overlaps of any two regions.
    Memory is O(blocks + sections), plus the description; only framing is read, never pages or
    bitmaps. What device sections mean is not looked at.

    Raises :class:`SnapshotError` when the stream is malformed, cut short or unfinished, and
    :class:`NotSupported` when it is a stream of another kind: sequential RAM, an unknown
    configuration. The source's own errors pass through.
    """
    return _MappedRamStreamReader(source, offset).stream(start)


def read_layouts(source: ByteSource, offset: int = 0) -> tuple[BlockLayout, ...]:
    """Return where the blocks of such a stream are in its file, without a look at what follows the list.

    Raises as :func:`parse`, but for what is wrong with the rest.
    """
    return _MappedRamStreamReader(source, offset).layouts()


class _MappedRamStreamReader(StreamReader):
    def stream(self, start: StreamStart | None) -> Stream:
        self._blocks: tuple[BlockLayout, ...] = ()
        self.read_head(start)
        ram_end, elements_end = self.read_rest()
        description, opaque = self._elements.description, self._elements.opaque
        self._check_overlaps(elements_end)
        return Stream(
            machine=self._configuration.machine,
            capabilities=self._configuration.capabilities,
            target_page_bits=self._configuration.target_page_bits,
            uuid=self._configuration.uuid,
            total_ram=self._total,
            blocks=self._blocks,
            sections=tuple(self._elements.sections),
            description=description.value if description else None,
            description_offset=description.offset if description else None,
            ram_end=ram_end,
            end=description.end if description else self._cursor.size if opaque else elements_end,
            complete=not opaque or description is not None,
            opaque_tail=opaque,
            background=self.background,
        )

    def layouts(self) -> tuple[BlockLayout, ...]:
        self._blocks = ()
        self.read_head()
        return self._blocks

    def _check_form(self) -> None:
        if MAPPED_RAM not in self._configuration.capabilities:
            raise NotSupported(
                "a sequential stream, without mapped-ram: its RAM is not at fixed offsets"
            )

    def _read_blocks(self, page_size: int | None) -> None:
        self._blocks = mapped_ram.read_entries(
            self._cursor,
            self._total,
            ignore_shared=IGNORE_SHARED in self._configuration.capabilities,
            page_size=page_size,
        )

    def _read_pages(self) -> None:
        self._read_end_mark("a section")

    def _check_overlaps(self, elements_end: int) -> None:
        """Check that no two of these share a byte: the stream's own bytes, bitmaps, pages."""
        regions: list[tuple[int, int, str, str | None]] = [
            (0, self._offset, "the data before the stream", None)
        ]
        start = self._offset
        for block in self._blocks:
            if block.external:
                continue
            bitmap_end = block.bitmap_offset + (block.num_pages + 7) // 8
            regions += [
                (start, block.header_end, "the stream", None),
                (block.bitmap_offset, bitmap_end, f"the bitmap of {block.name!r}", block.name),
                (block.pages_offset, block.pages_end, f"the pages of {block.name!r}", block.name),
            ]
            start = block.pages_end
        regions.append((start, elements_end, "the stream", None))
        description = self._elements.description
        if description:
            regions.append((description.offset, description.end, "the description", None))
        reach, previous = 0, ""
        previous_block: str | None = None
        for begin, end, what, block_name in sorted(regions, key=lambda region: region[:2]):
            if begin < end and begin < reach:
                raise SnapshotError(
                    f"{what} and {previous} overlap",
                    offset=begin,
                    block=block_name or previous_block,
                )
            if end > reach:
                reach, previous, previous_block = end, what, block_name
