"""Scan the memory of a snapshot: what is in each cell of a map.

found = memory_map("/snap/monday.mapped", "/snap/tuesday.mapped", cells=4096)
print(found.pages.data, found.areas[0].cell(0).entropy)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial

from pyqmigrate.analysis.addresses import placements
from pyqmigrate.analysis.areas import Area, By, Extent, areas_by_address, areas_by_block, clip
from pyqmigrate.analysis.block_comparison import opened, unreadable
from pyqmigrate.analysis.map_report import MappedArea, MemoryMap
from pyqmigrate.analysis.naming import naming
from pyqmigrate.analysis.page_bits import changed_against, changed_since_base, touched_pages
from pyqmigrate.analysis.random_access import random_access
from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, check_channels
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.page_map import LEVELS, MapCells, MapPart, map_pages
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.increment import IncrementSnapshot

__all__ = ["CELLS_MAX", "memory_map"]

CELLS_MAX = 1 << 21  # of 32 bytes while they are counted; pages of 8 GiB


def memory_map(
    snapshot: Snapshot | Target,
    other: Snapshot | Target | None = None,
    *,
    by: By | str | None = None,
    extent: Extent | None = None,
    cells: int = 1 << 16,
    seals: bool = True,
    working_set: bool = True,
    channels: int = 2,
    page_size: int | None = None,
    base: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> MemoryMap:
    """Scan a snapshot, and wait.

    snapshot, other: an open snapshot, which stays open; or a path, a ``file:`` URI or Descriptors.
        Pages that differ from those of ``other`` count as changed; without it, those that an increment
        has.
    by: ``address``, as an ELF core has the memory, with the blocks of unknown address behind it; or
        ``block``. None: by address if addresses are known.
    extent: the part to be scanned; None is all. Bytes of the address space, or of a block, which is
        possible by block, and for blocks without an address.
    cells: how many at most, up to 2097152. Their size is a power of two, at least a page.
    seals: whether seals are believed, as for ``diff``.
    working_set: whether ``SNAPSHOT.workingset`` is read, if it is there and of this snapshot.
    channels: threads that read, 1 to 255.
    page_size, base: as for ``diff``.
    progress: called on this thread at most ten times a second; if it raises, the work ends.

    A page without data in the file is not read. A compressed stream is unpacked into a temporary file
    first (``TMPDIR``, or /var/tmp). Raises SnapshotError for a damaged file (a note names it),
    NotSupported, UsageError, TargetError, Cancelled.
    """
    order = None if by is None else parse_enum(By, by, "by")
    check("extent", extent, Extent, type(None))
    check("cells", cells, int)
    if not 0 < cells <= CELLS_MAX:
        raise UsageError(f"cells must be 1 to {CELLS_MAX}, not {cells}")
    for name, value in (("seals", seals), ("working_set", working_set)):
        check(name, value, bool)
    check("page_size", page_size, int, type(None))
    check("base", base, str, os.PathLike, type(None))
    check_channels(channels)
    check_callback("progress", progress)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        ready = []
        for target in (snapshot, other):
            if target is None:
                continue
            with naming(target):
                found = stack.enter_context(opened(target, page_size, base))
                ready.append(stack.enter_context(random_access(found, progress)))
        scan = _Scan(ready[0], stack, channels, progress)
        if isinstance(snapshot, Snapshot):
            scan.name = snapshot.source.name
        elif isinstance(snapshot, str | os.PathLike):
            scan.name = os.fsdecode(snapshot)
        with naming(ready[0]):
            scan.place(order, extent, cells)
        scan.compare(ready[1] if other is not None else None, seals, working_set)
        return scan.run(started)


class _Scan:
    def __init__(
        self,
        snapshot: Snapshot,
        stack: contextlib.ExitStack,
        channels: int,
        progress: Callable[[Progress], object] | None,
    ) -> None:
        self._snapshot, self._stack, self._progress = snapshot, stack, progress
        self.name = snapshot.source.name
        self._channels = Channels(channels, "pyqmigrate-map")
        self._notes: list[str] = []
        self._parts: list[tuple[MapPart, str, int]] = []
        self._against: str | None = None
        self._touched = False

    def place(self, order: By | None, extent: Extent | None, cells: int) -> None:
        """Choose the areas and the size of cells, and open the parts of blocks in them."""
        blocks = self._snapshot.blocks
        inside = {name: block for name, block in blocks.items() if not block.external}
        self._notes += [
            f"block {name!r} is in another file, and is not shown"
            for name in blocks
            if name not in inside
        ]
        lengths = [(name, block.length) for name, block in inside.items()]
        placed = None
        if order is not By.BLOCK and not (order is None and extent and extent.block):
            placed, why_not = placements(self._snapshot, self._progress)
            if why_not is not None:
                if order is By.ADDRESS or (extent is not None and extent.block is None):
                    raise NotSupported(f"{why_not}; by=block shows the blocks (--by block)")
                placed = None
                self._notes.append(why_not)
        self.by = By.BLOCK if placed is None else By.ADDRESS
        areas = areas_by_block(lengths) if placed is None else areas_by_address(placed, lengths)
        if extent is not None:
            areas = clip(areas, extent, {name: blocks[name].page_size for name in inside})
        self.page_sizes = {
            part.block: inside[part.block].page_size for area in areas for part in area.parts
        }
        self.cell_size = _cell_size(areas, cells, max(self.page_sizes.values(), default=4096))
        self._lay_out(areas)

    def _lay_out(self, areas: tuple[Area, ...]) -> None:
        size = self.cell_size
        self._areas: list[tuple[Area, MapCells]] = []
        for area in areas:
            cells = MapCells(area.cells(size))
            self._areas.append((area, cells))
            for part in area.parts:
                page_size = self.page_sizes[part.block]
                if size // page_size >= 1 << 32:
                    raise NotSupported(f"{area.end - area.start} bytes are too many for a map")
                block = self._snapshot.blocks[part.block]
                mapped = MapPart(
                    part.block,
                    block.memory().part(part.offset, part.length),
                    page_size,
                    cells,
                    first_cell=part.start // size - area.start // size,
                    lead=part.start % size // page_size,
                    cell_pages=size // page_size,
                )
                self._stack.callback(mapped.close)
                self._parts.append((mapped, part.block, part.offset // page_size))

    def compare(self, other: Snapshot | None, seals: bool, working_set: bool) -> None:
        """Count changed and touched pages."""
        snapshot = self._snapshot
        changed: dict[str, Bitmap] = {}
        if other is not None:
            changed, notes = changed_against(
                snapshot,
                other,
                self._stack,
                seals=seals,
                channels=self._channels.count,
                progress=self._progress,
            )
            self._notes += notes
            self._against = other.source.name
        elif isinstance(snapshot, IncrementSnapshot):
            changed = changed_since_base(snapshot)
            self._against = snapshot.base.source.name
        touched = None
        if working_set:
            touched, notes = touched_pages(snapshot, self._stack)
            self._notes += notes
        self._touched = touched is not None
        for part, name, first in self._parts:
            if name in changed:
                part.add_changed(changed[name], first)
            if touched is not None and name in touched:
                part.add_touched(touched[name], first)

    def run(self, started: float) -> MemoryMap:
        parts = [part for part, _, _ in self._parts]
        total = sum(part.npages * part.page_size for part in parts)

        def failed(number: int, block: str) -> Exception:
            return unreadable(number, self._snapshot, block)

        Job(self._channels, total, partial(map_pages, self._channels, parts, failed)).wait(
            self._progress
        )
        counts = [cells.counts() for _, cells in self._areas]
        return MemoryMap(
            snapshot=self.name,
            against=self._against,
            machine=self._snapshot.machine,
            by=self.by,
            cell_size=self.cell_size,
            areas=tuple(MappedArea(area, cells.summaries()) for area, cells in self._areas),
            page_sizes=self.page_sizes,
            pages=sum(counts[1:], counts[0]) if counts else MapCells(0).counts(),
            levels=tuple(sum(part.levels[level] for part in parts) for level in range(LEVELS)),
            working_set=self._touched,
            bytes_read=self._channels.totals().bytes_moved,
            seconds=time.monotonic() - started,
            notes=tuple(self._notes),
        )


def _cell_size(areas: tuple[Area, ...], most: int, page_size: int) -> int:
    """Return the least power of two, at least a page, of which ``most`` cells are enough.

    With more areas than that, each has one cell.
    """
    size, longest = page_size, max((area.end for area in areas), default=0)
    while size < longest and sum(area.cells(size) for area in areas) > most:
        size *= 2
    return size
