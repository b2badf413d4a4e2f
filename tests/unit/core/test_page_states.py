"""Runs and additions of bitmaps: what the states of pages are kept in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness.examples import some
from tests.harness.kernel import Bits, to_bits, to_words
from tests.harness.strategies import page_bits

NPAGES = 700


def runs_twin(bits: Bits, first: int, end: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for page in range(first, end):
        if bits[page]:
            if found and sum(found[-1]) == page:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((page, 1))
    return found


@some
@given(page_bits(NPAGES), st.integers(0, NPAGES), st.integers(0, NPAGES), st.integers(1, 9))
def test_runs_are_those_of_the_twin_however_many_are_asked_for_at_once(
    bits: Bits, first: int, end: int, at_once: int
) -> None:
    words, runs, next_page = (
        to_words(bits),
        ffi.new("uint64_t[]", 2 * at_once),
        ffi.new("uint64_t *"),
    )
    found, page = [], first
    while page < end:
        n = lib.qm_list_runs(words, page, end, runs, at_once, next_page)
        found += [(runs[2 * k], runs[2 * k + 1]) for k in range(n)]
        assert n <= at_once
        page = next_page[0]
        assert n == at_once or page == end
    assert found == runs_twin(bits, first, end)


@some
@given(page_bits(NPAGES), page_bits(NPAGES), page_bits(NPAGES), st.booleans())
def test_bits_that_are_new_are_added_and_counted(
    seen: Bits, now: Bits, fresh: Bits, wanted: bool
) -> None:
    seen_words, fresh_words = to_words(seen), to_words(fresh)
    target = fresh_words if wanted else ffi.NULL
    count = lib.qm_add_bits(seen_words, to_words(now), target, NPAGES)
    assert count == (now & ~seen).sum()
    assert (to_bits(seen_words, NPAGES) == (seen | now)).all()
    assert (to_bits(fresh_words, NPAGES) == (now & ~seen if wanted else fresh)).all()
