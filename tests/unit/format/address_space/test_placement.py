"""Layers of placements, compared with an address space that has a value for every byte."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.format.address_space.placement import Hole, Placement, overlay
from tests.harness.examples import some

SPACE = 64

placements = st.builds(
    lambda block, address, offset, length: Placement(block, address, offset, length),
    st.sampled_from("ab"),
    st.integers(0, SPACE - 1),
    st.integers(0, 40),
    st.integers(1, 16),
)
holes = st.builds(Hole, st.integers(0, SPACE - 1), st.integers(1, 16))
layers = st.lists(st.lists(placements | holes, max_size=5), max_size=4)


def painted(layers: list[list[Placement]]) -> dict[int, tuple[str, int]]:
    """Which byte of which block is seen at each address."""
    seen: dict[int, tuple[str, int]] = {}
    for one in (one for layer in layers for one in layer):
        for n in range(one.length):
            seen.pop(one.address + n, None)
            if not isinstance(one, Hole):
                seen[one.address + n] = (one.block, one.offset + n)
    return seen


@some
@given(layers)
def test_what_is_seen_is_the_topmost(layers: list[list[Placement]]) -> None:
    assert painted([list(overlay(layers))]) == painted(layers)


@some
@given(layers)
def test_ranges_are_in_order_and_joined_where_they_go_on(layers: list[list[Placement]]) -> None:
    found = overlay(layers)
    for one, other in itertools.pairwise(found):
        assert one.end <= other.address
        assert not (
            one.end == other.address
            and one.block == other.block
            and one.offset + one.length == other.offset
        )
