"""Runs of pages get the guest addresses of their placements."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.analysis.addresses import page_ranges
from pyqmigrate.analysis.report import PageRange
from pyqmigrate.format.address_space.placement import Placement
from tests.harness.examples import some
from tests.harness.increment_files import bitmap_of
from tests.harness.kernel import Bits
from tests.harness.strategies import page_bits

PAGE = 4096


def bits(npages: int, *runs: tuple[int, int]) -> Bits:
    found = bytearray(npages)
    for first, end in runs:
        found[first:end] = b"\1" * (end - first)
    return np.frombuffer(bytes(found), dtype=bool)


def test_a_run_over_the_border_of_a_placement_is_split() -> None:
    placed = [Placement("ram", 0, 0, 4 * PAGE), Placement("ram", 1 << 32, 4 * PAGE, 4 * PAGE)]
    found = page_ranges("ram", PAGE, bitmap_of(bits(10, (2, 6), (9, 10))), placed)
    assert found == (PageRange(2, 4, 2 * PAGE), PageRange(4, 6, 1 << 32), PageRange(9, 10, None))


def test_a_page_that_is_shown_twice_has_the_lowest_address() -> None:
    placed = [Placement("bios", 0xF0000, 0, 4 * PAGE), Placement("bios", 0xFFFC0000, 0, 4 * PAGE)]
    assert page_ranges("bios", PAGE, bitmap_of(bits(4, (1, 2))), placed) == (
        PageRange(1, 2, 0xF0000 + PAGE),
    )


def test_the_placements_of_other_blocks_do_not_count() -> None:
    placed = [Placement("other", 0, 0, 4 * PAGE)]
    found = page_ranges("ram", PAGE, bitmap_of(bits(4, (0, 4))), placed)
    assert found == (PageRange(0, 4, None),)


@some
@given(st.data())
def test_the_ranges_are_the_pages_that_are_set(data: st.DataObject) -> None:
    npages = data.draw(st.integers(1, 150))
    wanted = data.draw(page_bits(npages))
    placed = [
        Placement("ram", data.draw(st.integers(0, 99)) << 20, first * PAGE, length * PAGE)
        for first, length in data.draw(
            st.lists(st.tuples(st.integers(0, 149), st.integers(1, 60)), max_size=4)
        )
    ]
    found = page_ranges("ram", PAGE, bitmap_of(wanted), placed)
    assert [page for r in found for page in range(r.first, r.end)] == wanted.nonzero()[0].tolist()
    for run in found:
        for page in range(run.first, run.end):
            addresses = [
                p.address + page * PAGE - p.offset
                for p in placed
                if p.offset <= page * PAGE < p.offset + p.length
            ]
            if run.address is None:
                assert addresses == []
            else:
                assert run.address + (page - run.first) * PAGE == min(addresses)
