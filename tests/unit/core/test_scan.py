"""Which pages are zero, and how bits are counted."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness import core_twin as twin
from tests.harness.examples import some
from tests.harness.kernel import PAGE_SIZES, guest, to_bits, to_words
from tests.harness.strategies import page_bits

GUARD = 0xA5A5A5A5A5A5A5A5


@some
@given(st.data(), st.sampled_from(PAGE_SIZES), st.integers(1, 200), st.integers(0, 64))
def test_scan_finds_the_pages_that_its_twin_finds(
    data: st.DataObject, page_size: int, npages: int, shift: int
) -> None:
    bits = data.draw(page_bits(npages))
    memory = guest(bits, page_size, seed=npages, shift=shift)
    words = ffi.new("uint64_t[]", [GUARD] * (-(-npages // 64) + 1))

    count = lib.qm_scan(ffi.from_buffer(memory), npages, page_size, words)

    expected = twin.scan(memory, page_size)
    assert count == expected.sum()
    assert (to_bits(words, npages) == expected).all()


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 130])
def test_scan_clears_the_unused_bits_and_touches_no_word_after_them(npages: int) -> None:
    memory = guest(np.ones(npages, dtype=bool), 1024)
    used = -(-npages // 64)
    words = ffi.new("uint64_t[]", [GUARD] * (used + 1))
    lib.qm_scan(ffi.from_buffer(memory), npages, 1024, words)
    assert not to_bits(words, used * 64)[npages:].any()
    assert words[used] == GUARD


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_scan_sees_a_single_byte_wherever_it_is(page_size: int) -> None:
    memory = np.zeros(3 * page_size, dtype=np.uint8)
    words = ffi.new("uint64_t[1]")
    for at in [0, 1, 7, 8, 255, 256, page_size // 2 + 3, page_size - 8, page_size - 1]:
        memory[:] = 0
        memory[page_size + at] = 0x80
        assert lib.qm_scan(ffi.from_buffer(memory), 3, page_size, words) == 1
        assert words[0] == 0b010, f"byte {at} of the page was not seen"


@pytest.mark.parametrize("page_size", [0, 1, 512, 1023, 3072, 65535, 1 << 17, 1 << 31])
def test_scan_refuses_a_page_size_that_is_none(page_size: int) -> None:
    words = ffi.new("uint64_t[1]")
    assert lib.qm_scan(ffi.new("char[4096]"), 1, page_size, words) == -errno.EINVAL


def test_scan_of_no_pages_sets_nothing() -> None:
    assert lib.qm_scan(ffi.new("char[1024]"), 0, 1024, ffi.new("uint64_t[1]")) == 0


@some
@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 9))
def test_is_zero_looks_at_every_byte_and_none_after(length: int, at: int, shift: int) -> None:
    memory = np.zeros(length + shift + 1, dtype=np.uint8)
    memory[shift + length] = 1
    pointer = ffi.from_buffer(memory[shift:])
    assert lib.qm_is_zero(pointer, length) == 1
    if at < length:
        memory[shift + at] = 1
        assert lib.qm_is_zero(pointer, length) == 0


@some
@given(st.binary(max_size=500))
def test_sum_adds_all_whole_words(raw: bytes) -> None:
    words = np.frombuffer(raw[: len(raw) // 8 * 8], dtype=np.uint64)
    expected = sum(words.tolist()) % 2**64
    assert lib.qm_sum(ffi.from_buffer(raw), len(raw)) == expected


@some
@given(st.data(), st.integers(1, 300), st.integers(0, 300))
def test_count_counts_only_the_first_pages(data: st.DataObject, npages: int, first: int) -> None:
    first = min(first, npages)
    bits = data.draw(page_bits(npages))
    last = ffi.new("int64_t *")
    assert lib.qm_count(to_words(bits), first, last) == bits[:first].sum()
    set_pages = np.flatnonzero(bits[:first])
    assert last[0] == (set_pages[-1] if len(set_pages) else -1)
