"""RAM blocks of a mapped-ram stream: their headers, and the places of bitmap and pages.

A block's entry in the RAM section, big-endian throughout
(docs/internals/format.md, "Block list")::

    str8 name | u64 length | [u64 guest address] | u32 version = 1 | u64 page size
              | u64 bitmap offset | u64 pages offset

Both offsets are absolute in the file, not relative to the stream. Page ``k`` of a block is always at
``pages_offset + k * page_size``; the stream continues after the last page. The bitmap has one bit
for each page, set if the page's slot holds its content, clear if the page is zero; its words are
in the *host's* byte order, not big-endian.

A block with both offsets zero is *external*: listed, but stored in a file of its own
(docs/internals/format.md, "External blocks").
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.format.cursor import Cursor

if TYPE_CHECKING:
    from pyqmigrate.format.stream.block_spec import BlockSpec

__all__ = [
    "BLOCKS_MAX",
    "OFFSET_MAX",
    "PAGES_ALIGNMENT",
    "PAGE_SIZES",
    "BlockLayout",
    "ByteOrder",
    "encode_entry",
    "place",
    "read_entries",
]

PAGE_SIZES = tuple(1 << bits for bits in range(10, 17))  # bytes: 1 KiB to 64 KiB
PAGES_ALIGNMENT = 1 << 20  # bytes, for writers; readers require page alignment only
OFFSET_MAX = (1 << 63) - 1  # bytes; file positions are signed 64-bit
BLOCKS_MAX = 1 << 16  # a longer list is taken for damage

_HEADER = struct.Struct(">IQQQ")  # version, page size, bitmap offset, pages offset
_HEADER_VERSION = 1
_U64 = struct.Struct(">Q")


ByteOrder: TypeAlias = Literal["little", "big"]
"""The byte order of the host that wrote a file: that of the words of its bitmaps."""


class BlockLayout(NamedTuple):
    """The place of a RAM block in a file. Lengths in bytes, offsets absolute in the file.

    ``header_offset`` is that of the 28-byte header. ``gpa`` is the guest physical address if the
    stream records it, for information only.
    """

    name: str
    length: int
    page_size: int
    header_offset: int
    bitmap_offset: int
    pages_offset: int
    gpa: int | None = None

    @property
    def num_pages(self) -> int:
        """The number of pages in the block, and of meaningful bits in its bitmap."""
        return self.length // self.page_size

    @property
    def external(self) -> bool:
        """Whether the content is in another file: the block has no bitmap and no pages here."""
        return self.bitmap_offset == 0 and self.pages_offset == 0

    @property
    def bitmap_size(self) -> int:
        """The size of the bitmap in bytes, in whole 64-bit words; 0 for an external block.

        Hosts with 32-bit words may omit the last four bytes; ``(num_pages + 7) // 8`` bytes are
        always in the file.
        """
        return 0 if self.external else (self.num_pages + 63) // 64 * 8

    @property
    def header_end(self) -> int:
        """The offset just after the header."""
        return self.header_offset + _HEADER.size

    @property
    def pages_end(self) -> int:
        """The offset at which the stream continues: after the last page's slot, or after the header
        of an external block.
        """
        return self.header_end if self.external else self.pages_offset + self.length


def place(spec: BlockSpec, header_end: int) -> BlockLayout:
    """Return the layout of a block whose header ends at absolute file offset ``header_end``.

    QEMU's rule: the bitmap right after the header, the pages at the next whole MiB after it
    (docs/internals/format.md, "Placement of bitmap and pages").

    Raises :class:`UsageError` if they would pass the largest file position.
    """
    bitmap_size = (spec.length // spec.page_size + 63) // 64 * 8
    pages_offset = -(-(header_end + bitmap_size) // PAGES_ALIGNMENT) * PAGES_ALIGNMENT
    if pages_offset + spec.length > OFFSET_MAX:
        raise UsageError(f"block {spec.name!r} would end past the largest file position")
    return BlockLayout(
        name=spec.name,
        length=spec.length,
        page_size=spec.page_size,
        header_offset=header_end - _HEADER.size,
        bitmap_offset=header_end,
        pages_offset=pages_offset,
    )


def encode_entry(
    spec: BlockSpec, entry_offset: int, *, ignore_shared: bool = False, external: bool = False
) -> tuple[bytes, BlockLayout]:
    """Return the entry of a block that starts at ``entry_offset``, and the block's layout.

    The stream continues at the layout's ``pages_end``. With ``ignore_shared`` the entry has the
    block's address in the guest, and the block can be ``external``.
    """
    name = spec.name.encode("utf-8", "surrogateescape")
    address = _U64.pack(spec.address) if ignore_shared else b""
    front = bytes([len(name)]) + name + _U64.pack(spec.length) + address
    header_end = entry_offset + len(front) + _HEADER.size
    if external:
        layout = BlockLayout(
            spec.name, spec.length, spec.page_size, header_end - _HEADER.size, 0, 0, spec.address
        )
    else:
        layout = place(spec, header_end)
    header = _HEADER.pack(
        _HEADER_VERSION, layout.page_size, layout.bitmap_offset, layout.pages_offset
    )
    return front + header, layout


def read_entries(
    cursor: Cursor, total: int, *, ignore_shared: bool, page_size: int | None
) -> tuple[BlockLayout, ...]:
    """Read the block list whose lengths add up to ``total`` bytes.

    With ``ignore_shared`` entries have a guest address and may be external. ``page_size`` is the one
    that the configuration states, or None. The cursor is left after the last block's pages.

    Raises :class:`SnapshotError` for an invalid entry. Regions are compared with the file's size
    here, and with each other by the caller.
    """
    blocks: list[BlockLayout] = []
    names: set[str] = set()
    remaining = total
    while remaining:
        if len(blocks) == BLOCKS_MAX:
            raise SnapshotError(f"more than {BLOCKS_MAX} RAM blocks", offset=cursor.position)
        block = _read_entry(cursor, ignore_shared)
        if block.name in names:
            raise _fault(block, "duplicate block name", "name")
        if block.length > remaining:
            raise _fault(
                block, f"the blocks are longer together than the total of {total} bytes", "length"
            )
        if page_size is not None and block.page_size != page_size:
            raise _fault(
                block,
                f"page size {block.page_size}, but {page_size} was stated before",
                "page_size",
            )
        page_size = block.page_size
        names.add(block.name)
        blocks.append(block)
        remaining -= block.length
        cursor.position = block.pages_end
    return tuple(blocks)


def _read_entry(cursor: Cursor, ignore_shared: bool) -> BlockLayout:
    offset = cursor.position
    name = cursor.text("the name of a RAM block")
    if not name:
        raise SnapshotError("a RAM block without a name", offset=offset, field="name")
    what = f"the entry of RAM block {name!r}"
    length = cursor.u64(what)
    gpa = cursor.u64(what) if ignore_shared else None
    header_offset = cursor.position
    version, page_size, bitmap_offset, pages_offset = _HEADER.unpack(
        cursor.take(_HEADER.size, what)
    )
    block = BlockLayout(name, length, page_size, header_offset, bitmap_offset, pages_offset, gpa)
    if version != _HEADER_VERSION:
        raise _fault(block, f"header version {version}, but only 1 exists", "version")
    fault = size_fault(length, page_size)
    if fault is not None:
        raise _fault(block, fault, "length" if page_size in PAGE_SIZES else "page_size")
    if block.external:
        if not ignore_shared:
            raise _fault(block, "no place for its pages in the file", "pages_offset")
        return block
    _check_place(block, cursor.size)
    return block


def _check_place(block: BlockLayout, size: int) -> None:
    if block.pages_offset % block.page_size:
        raise _fault(
            block, f"pages at {block.pages_offset:#x}, not on a page boundary", "pages_offset"
        )
    if block.pages_offset < block.header_end:
        raise _fault(
            block, f"pages at {block.pages_offset:#x}, before the block's header", "pages_offset"
        )
    if block.pages_end > OFFSET_MAX:
        raise _fault(block, "pages past the largest file position", "pages_offset")
    # The stream continues after the pages, so even pages that are all clear must be in the file.
    if block.pages_end > size:
        raise _fault(
            block,
            f"pages end at {block.pages_end:#x}, the file at {size:#x}:"
            " it was cut short, or the save did not finish",
            "pages_offset",
        )
    if block.bitmap_offset + (block.num_pages + 7) // 8 > size:
        raise _fault(
            block, f"bitmap at {block.bitmap_offset:#x} reaches past the end", "bitmap_offset"
        )


def size_fault(length: int, page_size: int) -> str | None:
    """Return what is wrong with a block of this length and page size (bytes); None if nothing is."""
    if page_size not in PAGE_SIZES:
        return f"page size {page_size} is not a power of two from 1024 to 65536"
    if length <= 0 or length % page_size:
        return f"length {length} is not a positive multiple of the page size {page_size}"
    if length > OFFSET_MAX:
        return f"length {length} is past the largest file position"
    return None


def _fault(block: BlockLayout, message: str, field: str) -> SnapshotError:
    return SnapshotError(message, offset=block.header_offset, block=block.name, field=field)
