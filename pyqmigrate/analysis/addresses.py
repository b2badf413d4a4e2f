"""The guest-physical addresses of pages that differ."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence

from pyqmigrate.analysis.report import PageRange
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.address_space.placement import Placement
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.job import Progress
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["page_ranges", "placements"]


def placements(
    snapshot: Snapshot, progress: Callable[[Progress], object] | None
) -> tuple[tuple[Placement, ...], str | None]:
    """Return where the snapshot's blocks are in the guest's address space, and None; or nothing, and
    why that is not known. Raises SnapshotError, TargetError."""
    from pyqmigrate.export.guest import Guest  # slow to import, and seldom needed

    try:
        return Guest.of(snapshot, (), progress).ranges, None
    except (NotSupported, UsageError) as error:
        return (), f"guest addresses are not known: {error}"


def page_ranges(
    name: str, page_size: int, differing: Bitmap, placed: Sequence[Placement]
) -> tuple[PageRange, ...]:
    """Return the runs of set bits, split where a run crosses the border of a placement.

    A part of a block that is shown at several addresses gets the lowest.
    """
    borders = _segments(name, page_size, differing.npages, placed)
    starts = [first for first, _, _ in borders]
    found: list[PageRange] = []
    for first, end in _runs(differing):
        while first < end:
            start, stop, address = borders[bisect.bisect_right(starts, first) - 1]
            upto = min(end, stop)
            at = None if address is None else address + (first - start) * page_size
            found.append(PageRange(first, upto, at))
            first = upto
    return tuple(found)


def _runs(bits: Bitmap) -> Iterator[tuple[int, int]]:
    first = 0
    while first < bits.npages:
        end = bits.run_end(first, bits.npages)
        if bits[first]:
            yield first, end
        first = end


def _segments(
    name: str, page_size: int, npages: int, placed: Sequence[Placement]
) -> list[tuple[int, int, int | None]]:
    """Return ``(first page, end, address)`` for the whole block, in order and without gaps."""
    ours = [p for p in placed if p.block == name]
    cuts = {0, npages}
    for p in ours:
        for offset in (p.offset, p.offset + p.length):
            cuts.add(min(offset // page_size, npages))
    ordered = sorted(cuts)
    segments = []
    for first, end in itertools.pairwise(ordered):
        offset = first * page_size
        addresses = [
            p.address + offset - p.offset for p in ours if p.offset <= offset < p.offset + p.length
        ]
        segments.append((first, end, min(addresses, default=None)))
    return segments
