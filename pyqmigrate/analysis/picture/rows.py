"""The rows of a picture: memory from left to right and from top to bottom, with round addresses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyqmigrate.analysis.map_report import MappedArea, MemoryMap
from pyqmigrate.io.page_map import SUMMARY

__all__ = ["NOTHING", "Row", "rows_of"]

NOTHING = bytes(SUMMARY)  # the summary of a cell without memory


@dataclass(frozen=True)
class Row:
    """A row of a picture. ``start`` is the address, or the offset in ``block``, of its first cell.

    ``cells`` are summaries, one for each column. ``names`` are the blocks of which a part begins here.
    ``first``: whether an area begins.
    """

    block: str | None
    start: int
    cells: tuple[bytes, ...]
    names: tuple[str, ...]
    first: bool


def rows_of(found: MemoryMap, columns: int) -> Iterator[Row]:
    """Yield the rows of all areas, ``columns`` cells each. A row starts at a multiple of its length."""
    for mapped in found.areas:
        yield from _rows(mapped, found.cell_size, columns)


def _rows(mapped: MappedArea, cell_size: int, columns: int) -> Iterator[Row]:
    area, length = mapped.area, columns * cell_size
    origin = area.start // cell_size  # the number of the first cell, from address 0 on
    for number in range(area.start // length, -(-area.end // length)):
        start, first = number * length, number * columns - origin
        cells = [
            mapped.cells[cell * SUMMARY : (cell + 1) * SUMMARY]
            if 0 <= cell < len(mapped)
            else NOTHING
            for cell in range(first, first + columns)
        ]
        names = dict.fromkeys(
            part.block for part in area.parts if start <= part.start < start + length
        )
        yield Row(area.block, start, tuple(cells), tuple(names), number == area.start // length)
