"""Block entries and their places."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.format.cursor import Cursor
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import (
    BLOCKS_MAX,
    PAGE_SIZES,
    BlockLayout,
    encode_entry,
    place,
    read_entries,
)
from tests.harness.stream_builders import Sparse

MIB = 1 << 20


def test_bitmap_follows_the_header_and_pages_start_at_a_whole_mib() -> None:
    layout = place(BlockSpec("pc.ram", 64 * MIB), 0x8E)
    assert (layout.header_offset, layout.bitmap_offset, layout.pages_offset) == (0x72, 0x8E, MIB)


def test_bitmap_longer_than_a_mib_pushes_the_pages_on() -> None:
    layout = place(BlockSpec("pc.ram", 40 << 30), 0x8A)
    assert layout.bitmap_size == 5 * MIB // 4
    assert layout.pages_offset == 2 * MIB


def test_bitmap_that_ends_on_a_mib_leaves_no_gap() -> None:
    spec = BlockSpec("pc.ram", 64 * 4096)
    assert place(spec, MIB - 8).pages_offset == MIB
    assert place(spec, MIB - 7).pages_offset == 2 * MIB


def test_bitmap_is_in_whole_words() -> None:
    assert place(BlockSpec("a", 4096), 100).bitmap_size == 8
    assert place(BlockSpec("a", 65 * 4096), 100).bitmap_size == 16


def test_external_block_has_neither_bitmap_nor_pages() -> None:
    layout = BlockLayout("a", 4096, 4096, header_offset=100, bitmap_offset=0, pages_offset=0)
    assert layout.external
    assert layout.bitmap_size == 0
    assert layout.pages_end == 128


@pytest.mark.parametrize("page_size", [0, 1, 512, 3000, 4097, 131072, -4096])
def test_page_size_out_of_range_is_refused(page_size: int) -> None:
    with pytest.raises(UsageError, match="page size"):
        BlockSpec("a", 1 << 20, page_size)


@pytest.mark.parametrize("length", [0, -4096, 4095, 4097, 1 << 63])
def test_length_that_is_not_whole_pages_is_refused(length: int) -> None:
    with pytest.raises(UsageError, match="length"):
        BlockSpec("a", length)


@pytest.mark.parametrize("name", ["", "a" * 256, "\u00e4" * 128, "\ud800"])
def test_name_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        BlockSpec(name, 4096)


def test_block_past_the_largest_file_position_is_refused() -> None:
    spec = BlockSpec("a", (1 << 63) - 4096)
    with pytest.raises(UsageError, match="largest file position"):
        place(spec, 4096)


names = st.binary(min_size=1, max_size=255).map(
    lambda data: data.decode("utf-8", "surrogateescape")
)


@given(
    name=names,
    pages=st.integers(1, 1 << 20),
    page_size=st.sampled_from(PAGE_SIZES),
    offset=st.integers(0, 1 << 40),
    address=st.none() | st.integers(0, (1 << 64) - 1),
)
def test_entry_reads_back_as_written(
    name: str, pages: int, page_size: int, offset: int, address: int | None
) -> None:
    spec = BlockSpec(name, pages * page_size, page_size, address or 0)
    shared = address is not None
    data, layout = encode_entry(spec, offset, ignore_shared=shared)
    layout = layout._replace(gpa=address)
    assert layout.header_end == offset + len(data)
    assert layout.bitmap_offset + layout.bitmap_size <= layout.pages_offset
    assert layout.pages_offset % MIB == 0
    cursor = Cursor(Sparse([(offset, data)], layout.pages_end), offset)
    assert read_entries(cursor, spec.length, ignore_shared=shared, page_size=None) == (layout,)
    assert cursor.position == layout.pages_end


def test_block_list_without_end_is_given_up() -> None:
    class Endless:
        """Entries of external blocks, each named after its own position, for ever."""

        size = 1 << 62

        def read_at(self, offset: int, length: int) -> bytes:
            first, skip = divmod(offset, 53)
            entries = (
                b"\x08%08x" % k
                + (4096).to_bytes(8, "big")
                + bytes(8)
                + (1).to_bytes(4, "big")
                + (4096).to_bytes(8, "big")
                + bytes(16)
                for k in range(first, first + length // 53 + 2)
            )
            return b"".join(entries)[skip : skip + length]

    with pytest.raises(SnapshotError, match=f"more than {BLOCKS_MAX} RAM blocks"):
        read_entries(Cursor(Endless(), 0), 1 << 62, ignore_shared=True, page_size=None)
