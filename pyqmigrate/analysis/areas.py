"""Where the blocks of a snapshot are on a map: areas, in which parts of blocks have places.

An area is a stretch of the guest's address space, with small gaps in it, or one block by itself. Cells
are of one size, and start at multiples of it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyqmigrate.errors import UsageError
from pyqmigrate.format.address_space.placement import Placement

__all__ = ["Area", "By", "Extent", "Part", "areas_by_address", "areas_by_block", "clip"]

_GAP_SHARE = 64  # a gap in an area is at most this part of all memory


class By(enum.StrEnum):
    """The order of a map: guest-physical addresses, or blocks."""

    ADDRESS = "address"
    BLOCK = "block"


@dataclass(frozen=True)
class Extent:
    """Bytes ``[start, end)`` to be shown: of the address space, or of ``block``."""

    start: int
    end: int
    block: str | None = None


@dataclass(frozen=True)
class Part:
    """Bytes ``[offset, offset + length)`` of ``block``, at ``start`` of its area's axis."""

    block: str
    offset: int
    length: int
    start: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Area:
    """A stretch of a map. ``parts`` are in order and do not overlap.

    The axis is in bytes: guest-physical addresses if ``block`` is None, else offsets in that block.
    """

    block: str | None
    parts: tuple[Part, ...]

    @property
    def start(self) -> int:
        return self.parts[0].start

    @property
    def end(self) -> int:
        return self.parts[-1].end

    def cells(self, cell_size: int) -> int:
        """Return the number of cells from the one of ``start`` to that of ``end``."""
        return -(-self.end // cell_size) - self.start // cell_size


def areas_by_block(lengths: Iterable[tuple[str, int]]) -> tuple[Area, ...]:
    """Return an area for each block of ``(name, length in bytes)``."""
    return tuple(Area(name, (Part(name, 0, length, 0),)) for name, length in lengths if length > 0)


def areas_by_address(
    placed: Sequence[Placement], lengths: Sequence[tuple[str, int]]
) -> tuple[Area, ...]:
    """Return the areas of the address space, then one for each block that is nowhere in it."""
    total = sum(placement.length for placement in placed)
    areas: list[Area] = []
    parts: list[Part] = []
    for placement in placed:
        if parts and (placement.address - parts[-1].end) * _GAP_SHARE > total:
            areas.append(Area(None, tuple(parts)))
            parts = []
        parts.append(Part(placement.block, placement.offset, placement.length, placement.address))
    if parts:
        areas.append(Area(None, tuple(parts)))
    known = {placement.block for placement in placed}
    return (*areas, *areas_by_block((n, length) for n, length in lengths if n not in known))


def clip(areas: Sequence[Area], extent: Extent, page_sizes: dict[str, int]) -> tuple[Area, ...]:
    """Return the parts of the areas that are in ``extent``, whole pages. UsageError if there are none."""
    found: list[Area] = []
    for area in areas:
        if area.block != extent.block:
            continue
        parts = [_clipped(part, extent, page_sizes[part.block]) for part in area.parts]
        kept = tuple(part for part in parts if part is not None)
        if kept:
            found.append(Area(area.block, kept))
    if not found:
        where = "guest-physical addresses" if extent.block is None else f"block {extent.block!r}"
        raise UsageError(f"no memory is at {extent.start:#x} to {extent.end:#x} of {where}")
    return tuple(found)


def _clipped(part: Part, extent: Extent, page_size: int) -> Part | None:
    first = max(extent.start - part.start, 0) // page_size * page_size
    last = min(-(-max(extent.end - part.start, 0) // page_size) * page_size, part.length)
    if first >= last:
        return None
    return Part(part.block, part.offset + first, last - first, part.start + first)
