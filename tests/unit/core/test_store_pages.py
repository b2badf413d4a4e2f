"""The kernels of a store: digests, kinds of pages, known pages and XOR, beside plain-Python twins."""

from __future__ import annotations

import errno
from array import array
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from pyqmigrate.core import Block
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.store_pages import (
    ExaminedPages,
    KnownPages,
    examine_pages,
    page_digests,
    xor_into,
)
from tests.harness.examples import few, some
from tests.harness.kernel import PAGE_SIZES, new_block, to_words

PAGE, KEY = 4096, bytes(range(100, 132))
ZERO, FILLED, DATA = lib.QM_PAGE_ZERO, lib.QM_PAGE_FILLED, lib.QM_PAGE_DATA


def digest_twin(page: bytes) -> bytes:
    return blake3(page, key=KEY).digest(length=16)


def kind_twin(page: bytes) -> int:
    if page == page[:8] * (PAGE // 8):
        return FILLED if any(page[:8]) else ZERO
    return DATA


class KnownTwin:
    """Known pages as a dictionary."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}
        self.npages = 0

    def add(self, digest: bytes) -> int:
        number = self.numbers.setdefault(digest, self.npages)
        self.npages += 1
        return number

    def find(self, digest: bytes) -> int:
        return self.numbers[digest] if digest in self.numbers else self.add(digest)


def pages_of(kinds: list[int], seed: int) -> bytearray:
    """Pages by a recipe: 0 zero, 1 filled, 2 and more data (equal numbers, equal pages)."""
    made = bytearray()
    for kind in kinds:
        if kind == 0:
            made += bytes(PAGE)
        elif kind == 1:
            made += bytes([0, 0, seed % 255 + 1, 0, 0, 0, 0, 7]) * (PAGE // 8)
        elif kind == 2:  # differs from a filled page in its last byte only
            made += b"\xcc" * (PAGE - 1) + b"\xcd"
        elif kind == 3:  # and from a zero page
            made += bytes(PAGE - 1) + b"\x01"
        else:
            made += np.random.default_rng(kind).bytes(PAGE)
    return made


recipes = st.lists(st.integers(0, 9), max_size=90)


def examine(data: bytearray) -> ExaminedPages:
    return examine_pages(KEY, Block(len(data), PAGE), None, 0, memoryview(data))


@some
@given(st.integers(0, 40), st.integers(0, 7), st.integers(0, 99))
def test_digests_are_those_of_the_library(npages: int, shift: int, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(npages * PAGE + shift)
    digests = ffi.new("unsigned char[]", npages * 16 + 1)
    for portable in (0, 1):
        ffi.memmove(digests, bytes(npages * 16 + 1), npages * 16 + 1)
        view = ffi.from_buffer(data) + shift
        assert lib.qm_blake3_pages(KEY, view, npages, portable, digests) == 0
        assert bytes(digests) == b"".join(
            digest_twin(data[shift + k * PAGE : shift + (k + 1) * PAGE]) for k in range(npages)
        ) + bytes(1)


def test_the_binding_digests_whole_pages_only() -> None:
    assert page_digests(KEY, bytes(2 * PAGE)) == 2 * digest_twin(bytes(PAGE))
    for key, length in ((KEY, PAGE + 1), (KEY[:31], PAGE)):
        with pytest.raises(UsageError, match="whole pages"):
            page_digests(key, bytes(length))


@some
@given(recipes, st.integers(0, 999))
def test_kinds_and_digests_are_those_of_the_twin(recipe: list[int], seed: int) -> None:
    data = pages_of(recipe, seed)
    examined = examine(data)
    for k in range(len(recipe)):
        page = bytes(data[k * PAGE : (k + 1) * PAGE])
        entry = examined.digests[16 * k : 16 * k + 16]
        kind = kind_twin(page)
        assert examined.kinds[k] == kind
        if kind != ZERO:
            assert entry == (page[:8] + bytes(8) if kind == FILLED else digest_twin(page))
    assert data == pages_of(recipe, seed)


@few
@given(st.data(), st.sampled_from(PAGE_SIZES))
def test_pages_with_a_clear_bit_become_zeros_and_others_stay(
    data: st.DataObject, page_size: int
) -> None:
    npages = data.draw(st.integers(1, 6 * 65536 // page_size))
    bits = np.array(data.draw(st.lists(st.booleans(), min_size=npages, max_size=npages)))
    length = npages * page_size
    content = np.random.default_rng(npages).integers(1, 255, length, dtype=np.uint8)
    first = data.draw(st.integers(0, length // PAGE))
    end = data.draw(st.integers(first, length // PAGE))
    expected = content.copy().reshape(npages, page_size)
    expected[~bits] = 0
    part = slice(first * PAGE, end * PAGE)
    found = bytearray(content[part].tobytes())
    bitmap = Bitmap(npages)
    bitmap.fill(memoryview(np.packbits(bits, bitorder="little").tobytes()))
    examined = examine_pages(KEY, Block(length, page_size), bitmap, first * PAGE, memoryview(found))
    assert found == expected.reshape(-1)[part].tobytes()
    assert list(examined.kinds) == [
        kind_twin(bytes(found[k * PAGE : (k + 1) * PAGE])) for k in range(end - first)
    ]
    bitmap.close()


@pytest.mark.parametrize(
    ("page_size", "offset", "npages"),
    [(512, 0, 1), (131072, 0, 1), (4097, 0, 1), (4096, 100, 1), (4096, 0, 5), (4096, 1 << 63, 1),
     (4096, 8192, 1 << 60), (4096, 4 * PAGE + PAGE, 0)],
)  # fmt: skip
def test_pages_outside_of_the_block_are_not_touched(
    page_size: int, offset: int, npages: int
) -> None:
    block = new_block(4 * PAGE, page_size, 0)
    data, kinds, digests = bytearray(b"\1" * PAGE), bytearray(1), bytearray(16)
    buffers = [ffi.from_buffer(buffer) for buffer in (data, kinds, digests)]
    rc = lib.qm_examine_pages(
        KEY, block, to_words(np.zeros(4, dtype=bool)), offset, buffers[0], npages, *buffers[1:]
    )
    assert rc == -errno.EINVAL
    assert data == b"\1" * PAGE


class Finder:
    """Known pages, with room for the results of a call."""

    def __init__(self, room: int) -> None:
        self.known = KnownPages(room)

    def find(self, data: bytearray, page: int) -> tuple[Any, bytes, list[int]]:
        npages = len(data) // PAGE
        fresh, places = bytearray(len(data)), array("Q", bytes(8 * npages))
        found = self.known.find(
            memoryview(data), page, examine(data), memoryview(fresh), memoryview(places)
        )
        return found, bytes(fresh[: found.fresh * PAGE]), list(places[: found.fresh])


def expand(runs: Any, step: int) -> list[tuple[int, int]]:
    """Pages and their numbers; ``step`` is by how much the number grows from page to page."""
    return [
        (runs[k] + i, runs[k + 2] + step * i)
        for k in range(0, len(runs), 3)
        for i in range(runs[k + 1])
    ]


@few
@given(st.lists(recipes, min_size=1, max_size=3), st.lists(st.integers(4, 9), max_size=8))
def test_pages_are_found_as_by_the_twin(batches: list[list[int]], packed: list[int]) -> None:
    finder, twin = Finder(1000), KnownTwin()
    for number in packed:
        digest = digest_twin(bytes(pages_of([number], 0)))
        finder.known.add_pack(digest)
        twin.add(digest)
    assert list(finder.known.starts) == list(range(len(packed) + 1))
    page = 17
    for recipe in batches:
        data = pages_of(recipe, 5)
        before, new, fresh, places = twin.npages, [], b"", []
        expected, fills = [], []
        for k in range(len(recipe)):
            content = bytes(data[k * PAGE : (k + 1) * PAGE])
            kind = kind_twin(content)
            if kind == FILLED:
                fills.append((page + k, int.from_bytes(content[:8], "little")))
            if kind != DATA:
                continue
            digest = digest_twin(content)
            if digest not in twin.numbers:
                new.append(digest)
                fresh += content
                places.append(page + k)
            expected.append((page + k, twin.find(digest)))
        found, found_fresh, found_places = finder.find(data, page)
        assert expand(found.runs, 1) == expected
        assert expand(found.fills, 0) == fills
        assert (found_fresh, found_places) == (fresh, places)
        assert len(finder.known) == twin.npages
        assert finder.known.digests(before, len(new)) == b"".join(new)
        page += len(recipe)
    finder.known.close()


def test_runs_are_as_long_as_can_be() -> None:
    finder = Finder(100)
    found, _, _ = finder.find(pages_of([4, 5, 6, 0, 1, 1, 7], 0), 0)
    assert list(found.runs) == [0, 3, 0, 6, 1, 3]
    assert list(found.fills[:2]) == [4, 2]
    found, fresh, _ = finder.find(pages_of([5, 6, 7, 4, 5], 0), 50)
    assert list(found.runs) == [50, 3, 1, 53, 2, 0]
    assert fresh == b""
    finder.known.close()


def test_the_table_grows_with_what_is_known() -> None:
    finder = Finder(150_000)
    rng = np.random.default_rng(3)
    digests = rng.bytes(16 * 100_000)
    finder.known.add_pack(digests)
    finder.find(pages_of([4, 5], 0), 0)
    lookup = ExaminedPages(bytearray([DATA] * 1000), bytearray(digests[16 * 77_000 :][:16_000]))
    fresh, places = bytearray(1000 * PAGE), array("Q", bytes(8000))
    data = memoryview(bytearray(1000 * PAGE))
    found = finder.known.find(data, 5, lookup, memoryview(fresh), memoryview(places))
    assert list(found.runs) == [5, 1000, 77_000]
    assert found.fresh == 0
    finder.known.close()
    finder.known.close()


def test_too_little_room_is_refused_and_nothing_is_changed() -> None:
    finder = Finder(2)
    with pytest.raises(UsageError, match="no room"):
        finder.known.add_pack(bytes(48))
    with pytest.raises(UsageError, match="no room"):
        finder.find(pages_of([4, 5, 6], 0), 0)
    assert len(finder.known) == 0
    data = pages_of([4, 5], 0)
    short = memoryview(bytearray(PAGE))
    with pytest.raises(UsageError, match="no room"):
        finder.known.find(memoryview(data), 0, examine(data), short, memoryview(array("Q", [0, 0])))
    with pytest.raises(NotSupported):
        KnownPages(1 << 32)
    finder.known.close()


@pytest.mark.parametrize(
    ("nslots", "npages", "room", "expected"),
    [(8, 5, 8, -errno.ENOSPC), (6, 2, 8, -errno.ENOSPC), (8, 9, 8, -errno.EINVAL), (8, 4, 8, 0)],
)
def test_a_table_that_is_too_small_is_refused(
    nslots: int, npages: int, room: int, expected: int
) -> None:
    known = ffi.new("struct qm_known *")
    digests = ffi.from_buffer(bytearray(np.random.default_rng(1).bytes(16 * 9)))
    slots = ffi.new("uint32_t[]", nslots)
    known.digests, known.room, known.slots, known.nslots = digests, room, slots, nslots
    assert lib.qm_known_index(known, 0, npages) == expected
    assert known.npages == (npages if expected == 0 else 0)


@some
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=8),
)
def test_runs_are_split_where_packs_end(sizes: list[int], drawn: list[tuple[int, int]]) -> None:
    starts = array("Q", [0])
    for size in sizes:
        starts.append(starts[-1] + size)
    total, runs = starts[-1], array("Q")
    for k, (number, npages) in enumerate(drawn):
        if number < total:
            runs.extend([100 * k, min(npages, total - number), number])
    known = KnownPages(10)
    placed = known.place(runs, starts)
    pages = []
    for first, count, page, pack in zip(
        placed.firsts, placed.counts, placed.pages, placed.packs, strict=True
    ):
        assert count > 0
        assert page + count <= sizes[pack]
        pages += [(first + i, starts[pack] + page + i) for i in range(count)]
    assert pages == expand(runs, 1)
    with pytest.raises(UsageError, match="no pack"):
        known.place(array("Q", [0, 1, total]), starts)
    with pytest.raises(UsageError, match="no pack"):
        known.place(array("Q", [0, total + 1, 0]), starts)
    known.close()


@some
@given(st.binary(max_size=300), st.integers(0, 9))
def test_xor_is_that_of_its_twin(data: bytes, seed: int) -> None:
    other = np.random.default_rng(seed).bytes(len(data))
    buffer = bytearray(data)
    xor_into(buffer, other)
    assert buffer == bytes(a ^ b for a, b in zip(data, other, strict=True))
    with pytest.raises(UsageError):
        xor_into(buffer, other + b"x")
