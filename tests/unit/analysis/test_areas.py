"""Where blocks are on a map."""

from __future__ import annotations

import pytest

from pyqmigrate.analysis.areas import Area, Extent, Part, areas_by_address, areas_by_block, clip
from pyqmigrate.errors import UsageError
from pyqmigrate.format.address_space.placement import Placement

MIB = 1 << 20
PLACED = [
    Placement("ram", 0, 0, 640 << 10),
    Placement("ram", MIB, MIB, 127 * MIB),
    Placement("vga", 0xFD000000, 0, 16 * MIB),
]
LENGTHS = [("ram", 128 * MIB), ("vga", 16 * MIB), ("rom", 4096), ("empty", 0)]


def test_a_small_gap_is_inside_of_an_area_and_a_large_one_between_two() -> None:
    areas = areas_by_address(PLACED, LENGTHS)
    assert [(area.block, area.start, area.end) for area in areas] == [
        (None, 0, 128 * MIB),
        (None, 0xFD000000, 0xFE000000),
        ("rom", 0, 4096),
    ]
    assert areas[0].parts[1] == Part("ram", MIB, 127 * MIB, MIB)


def test_by_block_each_block_that_is_not_empty_has_an_area() -> None:
    assert [area.block for area in areas_by_block(LENGTHS)] == ["ram", "vga", "rom"]


@pytest.mark.parametrize(("size", "cells"), [(4096, 3), (8192, 2), (1 << 20, 1)])
def test_cells_start_at_multiples_of_their_size(size: int, cells: int) -> None:
    area = Area(None, (Part("ram", 0, 3 * 4096, 4096),))
    assert area.cells(size) == cells


def test_a_clipped_part_begins_and_ends_with_whole_pages() -> None:
    areas = areas_by_address(PLACED, LENGTHS)
    (area,) = clip(areas, Extent(MIB + 1, MIB + 4097), dict.fromkeys(("ram", "vga", "rom"), 4096))
    assert area.parts == (Part("ram", MIB, 8192, MIB),)


def test_an_extent_in_a_gap_is_refused() -> None:
    areas = areas_by_address(PLACED, LENGTHS)
    with pytest.raises(UsageError, match="0xa0000"):
        clip(areas, Extent(640 << 10, MIB), {"ram": 4096, "vga": 4096, "rom": 4096})
