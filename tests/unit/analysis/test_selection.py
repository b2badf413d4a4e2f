"""Which pages have to be compared, by the digests of two seals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.analysis.selection import _differing
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.seal import PIECE, SealHead
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.integrity.manifest import Manifest
from tests.harness.examples import some

PAGE = 4096
PAGES = PIECE // PAGE


def sealed(digests: list[int]) -> Manifest:
    head = SealHead(Algorithm.XXH3_128, len(digests) * PIECE, 0, True)
    return Manifest(head, b"".join(bytes([digest]) * 16 for digest in digests))


def block(npages: int, first_piece: int) -> BlockLayout:
    return BlockLayout("ram", npages * PAGE, PAGE, 0, 100, first_piece * PIECE)


@some
@given(
    st.lists(st.integers(1, 3), max_size=9),
    st.lists(st.integers(1, 3), max_size=9),
    st.integers(1, 6 * PAGES),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_pages_are_left_out_only_where_digests_are_equal(
    of_a: list[int], of_b: list[int], npages: int, start_a: int, start_b: int
) -> None:
    found = _differing(sealed(of_a), sealed(of_b), block(npages, start_a), block(npages, start_b))
    selected = {page for first, end in found for page in range(first, end)}
    twin = {
        page
        for page in range(npages)
        if of_a[start_a + page // PAGES : start_a + page // PAGES + 1]
        != of_b[start_b + page // PAGES : start_b + page // PAGES + 1]
    }
    assert selected == twin


def test_a_block_that_claims_much_costs_what_the_files_have() -> None:
    found = _differing(sealed([1, 2]), sealed([1, 3]), block(1 << 45, 0), block(1 << 45, 0))
    assert list(found) == [(PAGES, 2 * PAGES)]
