"""Bitmaps: bits, runs, and their way to a file and back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from tests.harness.core_twin import stretches
from tests.harness.examples import some
from tests.harness.kernel import Bits
from tests.harness.strategies import page_bits


class File:
    """What a bitmap is written to and read from."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("file")
        self.written: list[tuple[int, int]] = []

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        self.written.append((offset, len(data)))
        os.pwrite(self.fd, data, offset)

    def read_at(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def layout(npages: int, at: int = 100) -> BlockLayout:
    pages = -(-(at + (npages + 63) // 64 * 8) // (1 << 20)) << 20
    return BlockLayout("ram", npages * 4096, 4096, at - 28, at, pages)


def bitmap_of(bits: Bits) -> Bitmap:
    bitmap = Bitmap(len(bits))
    for k in np.flatnonzero(bits).tolist():
        bitmap.core[k // 64] |= 1 << k % 64
    return bitmap


@some
@given(st.data(), st.integers(1, 500))
def test_bits_are_counted_and_found(data: st.DataObject, npages: int) -> None:
    bits = data.draw(page_bits(npages))
    bitmap = bitmap_of(bits)
    assert [bitmap[k] for k in range(npages)] == bits.tolist()
    assert bitmap.count() == bits.sum()
    first = data.draw(st.integers(0, npages))
    assert bitmap.count(first) == bits[:first].sum()
    assert bitmap.last() == (np.flatnonzero(bits)[-1] if bits.any() else -1)
    bitmap.close()


@some
@given(st.data(), st.integers(1, 500))
def test_runs_cover_the_range_and_alternate(data: st.DataObject, npages: int) -> None:
    bits = data.draw(page_bits(npages))
    first = data.draw(st.integers(0, npages))
    end = data.draw(st.integers(first, npages))
    bitmap = bitmap_of(bits)
    found = bitmap.runs(first, end)
    assert [(a + 0, b + 0) for a, b, present in found if present] == [
        (a + first, b + first) for a, b in stretches(bits[first:end])
    ]
    assert [a for a, _, _ in found] == [first, *[b for _, b, _ in found]][: len(found)]
    assert (found[-1][1] if found else first) == end
    bitmap.close()


@some
@given(st.data(), st.sampled_from([1, 63, 64, 65, 1000, 40000, 1 << 20]), st.booleans())
def test_what_is_written_is_read(data: st.DataObject, npages: int, everything: bool) -> None:
    bits = np.zeros(npages, dtype=bool)
    few = data.draw(st.lists(st.integers(0, npages - 1), max_size=40))
    bits[few] = True
    place = layout(npages)
    with File() as file:
        if everything:  # old bytes are there
            os.pwrite(file.fd, b"\xff" * (npages // 8 + 100), 100)
        bitmap = bitmap_of(bits)
        bitmap.write_to(file, place.bitmap_offset, everything=everything)
        bitmap.close()
        os.ftruncate(file.fd, place.pages_end)
        again = Bitmap.read_from(file, place, "little")
    expected = np.flatnonzero(bits).tolist()
    raw = np.frombuffer(again._memory, dtype=np.uint8)
    assert np.flatnonzero(np.unpackbits(raw, bitorder="little")).tolist() == expected
    del raw
    again.close()


def test_stretches_of_zeros_are_not_written() -> None:
    bits = np.zeros(1 << 20, dtype=bool)
    bits[[0, 700000]] = True
    with File() as file:
        bitmap = bitmap_of(bits)
        bitmap.write_to(file, 0, everything=False)
        bitmap.close()
        assert sum(length for _, length in file.written) <= 2 * 4096


@pytest.mark.parametrize("npages", [1, 63, 65, 130])
def test_a_bit_past_the_end_is_an_error_that_says_where(npages: int) -> None:
    place = layout(npages)
    with File() as file:
        os.ftruncate(file.fd, place.pages_end)
        os.pwrite(file.fd, b"\x80", place.bitmap_offset + place.bitmap_size - 1)
        with pytest.raises(SnapshotError) as caught:
            Bitmap.read_from(file, place, "little")
    assert (caught.value.block, caught.value.field) == ("ram", "bitmap")


def test_a_page_past_the_end_of_the_file_is_an_error_that_says_where() -> None:
    place = layout(256)
    with File() as file:
        os.pwrite(file.fd, b"\x80", place.bitmap_offset + 31)
        os.ftruncate(file.fd, place.pages_end - 1)
        with pytest.raises(SnapshotError) as caught:
            Bitmap.read_from(file, place, "little")
    assert caught.value.field == "pages"
    assert caught.value.offset == place.pages_end - 4096


def test_a_bitmap_of_a_32_bit_writer_may_lack_its_last_four_bytes() -> None:
    place = layout(32)
    with File() as file:
        os.pwrite(file.fd, b"\0\0\0\0", place.bitmap_offset)
        bitmap = Bitmap.read_from(file, place, "little")
    assert bitmap.count() == 0
    bitmap.close()


def test_a_bitmap_that_the_file_cuts_off_is_an_error() -> None:
    place = layout(1000)
    with File() as file:
        os.pwrite(file.fd, b"\xff" * 100, place.bitmap_offset)
        with pytest.raises(SnapshotError):
            Bitmap.read_from(file, place, "little")


def test_an_empty_bitmap_of_a_huge_block_costs_next_to_nothing() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    bitmap = Bitmap(1 << 33)
    bitmap.core[1 << 20] = 1
    assert bitmap[1 << 26]
    assert resident() - before < 4 << 20
    bitmap.close()
    bitmap.close()


def test_pages_outside_a_bitmap_are_an_index_error() -> None:
    bitmap = Bitmap(100)
    for page in (-1, 100, 10**12):
        with pytest.raises(IndexError):
            bitmap[page]
    assert list(bitmap) == [False] * 100


def test_a_closed_bitmap_is_refused_and_not_followed() -> None:
    bitmap = Bitmap(100)
    bitmap.close()
    with pytest.raises(UsageError):
        bitmap.count()
    with pytest.raises(UsageError):
        bitmap[0]


def test_looking_at_an_empty_bitmap_costs_no_memory() -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))

    bitmap = Bitmap(8 * (64 << 20))
    before = resident()
    assert bitmap.count() == 0
    assert resident() - before < 16 << 10  # KiB; the bitmap has 64 MiB


@pytest.mark.parametrize("npages", [1 << 61, 1 << 80])
def test_more_pages_than_memory_has_bits_for_are_not_supported(npages: int) -> None:
    with pytest.raises(NotSupported, match="too large"):
        Bitmap(npages)


def test_a_read_that_ends_before_the_file_does_is_not_a_clear_bitmap() -> None:
    """It was taken for zeros, and the pages were loaded as zeros."""

    class Short(File):
        def read_at(self, offset: int, length: int) -> bytes:
            return super().read_at(offset, max(0, min(length, 200 - offset)))

    with Short() as file:
        place = layout(4096)
        bitmap = bitmap_of(np.ones(4096, dtype=bool))
        bitmap.write_to(file, place.bitmap_offset, everything=True)
        os.truncate(file.fd, place.pages_end)
        with pytest.raises(SnapshotError, match="ends within the bitmap") as caught:
            Bitmap.read_from(file, place, "little")
        assert (caught.value.block, caught.value.offset) == ("ram", 200)


@given(st.data(), st.integers(1, 300))
def test_bits_of_another_bitmap_are_added_and_removed(data: st.DataObject, npages: int) -> None:
    ours, theirs = (
        np.array(data.draw(st.lists(st.booleans(), min_size=npages, max_size=npages)))
        for _ in range(2)
    )

    def bitmap(bits: Bits) -> Bitmap:
        made = Bitmap(npages)
        made.fill(memoryview(np.packbits(bits, bitorder="little").tobytes()))
        return made

    other = bitmap(theirs)
    for change, expected in ((Bitmap.add, ours | theirs), (Bitmap.remove, ours & ~theirs)):
        changed = bitmap(ours)
        change(changed, other)
        assert [changed[page] for page in range(npages)] == list(expected)
        assert changed.count() == expected.sum()
    changed.add_all()
    assert changed.count() == npages
    with pytest.raises(UsageError, match="bitmaps of"):
        changed.add(Bitmap(npages + 1))
    with pytest.raises(UsageError, match="bitmaps of"):
        changed.remove(Bitmap(npages + 1))


def test_adding_to_a_long_bitmap_costs_what_is_set() -> None:
    long, other = Bitmap(1 << 33), Bitmap(1 << 33)
    other.core[1 << 26] = 1
    long.add(other)
    assert long.count() == 1
    assert long[(1 << 26) * 64]
    long.remove(other)
    assert long.count() == 0


@given(st.integers(0, 300), st.integers(0, 300))
def test_removed_range_is_clear_and_no_other_bit(first: int, end: int) -> None:
    first, end = sorted((first, end))
    bitmap = Bitmap(300)
    try:
        bitmap.add_all()
        bitmap.remove_range(first, end)
        assert [bitmap[page] for page in range(300)] == [
            not first <= page < end for page in range(300)
        ]
        assert bitmap.count() == 300 - (end - first)
    finally:
        bitmap.close()


@pytest.mark.parametrize("pages", [(-1, 2), (3, 2), (0, 301)])
def test_range_that_does_not_exist_is_not_removed(pages: tuple[int, int]) -> None:
    bitmap = Bitmap(300)
    try:
        with pytest.raises(UsageError):
            bitmap.remove_range(*pages)
    finally:
        bitmap.close()
