"""Stepping over live sections: where the reader stops, and what it refuses."""

import struct
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.cursor import Cursor
from pyqmigrate.format.stream.live_sections import CHUNKS_MAX, ChunkBudget, body_reader
from tests.harness.stream_builders import Sparse, str8, words


def stepped(name: str, version: int, body: bytes, *, start: bool = False) -> int:
    """How many bytes the reader takes, with other bytes after the body."""
    walk = body_reader(name, version)
    assert walk is not None
    cursor = Cursor(Sparse([(0, body + b"\x7eafter")]), 0)
    walk(cursor, start, ChunkBudget())
    return cursor.position


def test_unknown_sections_have_no_walker() -> None:
    assert body_reader("vfio", 1) is None
    assert body_reader("dirty-bitmap", 2) is None


def test_dirty_bitmap_without_bitmaps_is_one_byte() -> None:
    assert stepped("dirty-bitmap", 1, b"\x01", start=True) == 1


def test_dirty_bitmap_start_as_qemu_writes_it() -> None:
    body = bytes.fromhex("1c016403626d310000100000 1403626d300001000001 01")
    assert stepped("dirty-bitmap", 1, body, start=True) == len(body)


def test_dirty_bitmap_bits_are_stepped_over() -> None:
    bits = b"\x44" + str8("bm") + words(0) + struct.pack(">I", 9) + words(1000) + bytes(1000)
    zeroes = b"\x46" + str8("bm") + words(9) + struct.pack(">I", 9)
    body = bits + zeroes + b"\x24" + str8("bm") + b"\x01"
    assert stepped("dirty-bitmap", 1, body) == len(body)


@pytest.mark.parametrize("flags", [b"\x80\x01", b"\x80\x80\x00\x01"])
def test_dirty_bitmap_flags_may_be_wider(flags: bytes) -> None:
    assert stepped("dirty-bitmap", 1, flags) == len(flags)


def test_dirty_bitmap_longer_than_the_file_is_refused() -> None:
    body = b"\x40" + words(0) + struct.pack(">I", 9) + words((1 << 64) - 1)
    with pytest.raises(SnapshotError, match="ends inside"):
        stepped("dirty-bitmap", 1, body)


def test_htab_start_is_one_word() -> None:
    assert stepped("spapr/htab", 1, struct.pack(">I", 20), start=True) == 4


def test_htab_runs_end_with_an_empty_one() -> None:
    run = struct.Struct(">IHH")
    body = bytes(4) + run.pack(0, 2, 5) + bytes(32) + run.pack(9, 0, 3) + run.pack(0, 0, 0)
    assert stepped("spapr/htab", 1, body) == len(body)


def test_missing_htab_is_one_word() -> None:
    assert stepped("spapr/htab", 1, b"\xff\xff\xff\xff") == 4


def test_htab_size_in_a_part_is_refused() -> None:
    with pytest.raises(SnapshotError, match="table size"):
        stepped("spapr/htab", 1, struct.pack(">I", 20))


def test_storage_attributes_end_with_their_mark() -> None:
    body = words(0x1002, 3) + b"abc" + words(8, 1)
    assert stepped("s390-storage_attributes", 0, body) == len(body)


def test_unknown_storage_attribute_flags_are_refused() -> None:
    with pytest.raises(SnapshotError, match="flags 0x4"):
        stepped("s390-storage_attributes", 0, words(4))


@pytest.mark.parametrize("name", ["dirty-bitmap", "spapr/htab", "s390-storage_attributes"])
def test_section_without_end_is_given_up(name: str) -> None:
    class Endless:
        """ChunkBudget that never end, of eight bytes so that each reader stays in step."""

        size = 1 << 60
        unit = {
            "dirty-bitmap": bytes(8),
            "spapr/htab": struct.pack(">IHH", 0, 0, 7),
            "s390-storage_attributes": words(8),
        }[name]

        def read_at(self, offset: int, length: int) -> bytes:
            if name == "spapr/htab":  # the first word is zero, runs follow
                if offset == 0:
                    return (bytes(4) + self.unit * (length // 8 + 1))[:length]
                offset -= 4
            skip = offset % 8
            return b"".join(repeat(self.unit, length // 8 + 2))[skip : skip + length]

    walk = body_reader(name, 0 if name.startswith("s390") else 1)
    assert walk is not None
    with pytest.raises(SnapshotError, match=f"more than {CHUNKS_MAX} empty"):
        walk(Cursor(Endless(), 0), False, ChunkBudget())


def test_empty_chunks_of_all_bodies_together_are_bounded() -> None:
    walk, chunks = body_reader("dirty-bitmap", 1), ChunkBudget()
    assert walk is not None
    body = Sparse([(0, bytes(CHUNKS_MAX // 2) + b"\1")])
    for _ in range(2):
        walk(Cursor(body, 0), False, chunks)
    with pytest.raises(SnapshotError, match="more than"):
        walk(Cursor(body, 0), False, chunks)


def test_chunks_with_content_are_as_many_as_the_file_has() -> None:
    class Counting(ChunkBudget):
        def __init__(self) -> None:
            self._left = 1

    run = struct.pack(">IHH", 0, 1, 5) + bytes(16)
    walk, body = body_reader("spapr/htab", 1), bytes(4) + run * 9 + bytes(8)
    assert walk is not None
    cursor = Cursor(Sparse([(0, body)]), 0)
    walk(cursor, False, Counting())
    assert cursor.position == len(body)


@pytest.mark.parametrize(
    ("name", "version"), [("dirty-bitmap", 1), ("spapr/htab", 1), ("s390-storage_attributes", 0)]
)
@given(body=st.binary(max_size=200), start=st.booleans())
def test_noise_is_refused_or_stays_in_the_file(
    name: str, version: int, body: bytes, start: bool
) -> None:
    walk = body_reader(name, version)
    assert walk is not None
    cursor = Cursor(Sparse([(0, body)], len(body)), 0)
    try:
        walk(cursor, start, ChunkBudget())
    except SnapshotError:
        return
    assert cursor.position <= len(body)
