"""Count the pages of a snapshot's blocks in the cells of a map, by what is in them.

cells = MapCells(1024)
part = MapPart("pc.ram", block.memory(), 4096, cells, first_cell=0, lead=0, cell_pages=64)
map_pages(channels, [part], failed)
summaries = cells.summaries()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from pyqmigrate import _core
from pyqmigrate.core import Channel
from pyqmigrate.errors import UsageError
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, split_ranges
from pyqmigrate.io.memory import OpenMemory, SnapshotMemory

__all__ = ["LEVELS", "SUMMARY", "Counts", "MapCells", "MapPart", "map_pages"]

SUMMARY: int = _core.lib.QM_SUMMARY  # bytes of a cell's summary
LEVELS: int = _core.lib.QM_LEVELS


@dataclass(frozen=True)
class Counts:
    """Numbers of pages: ``data``, ``filled``, ``zero`` and ``hole`` are disjoint."""

    data: int = 0
    filled: int = 0
    zero: int = 0
    hole: int = 0
    changed: int = 0
    touched: int = 0

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Counts(*(a + b for a, b in pairs))

    @property
    def all(self) -> int:
        """The pages of all classes."""
        return self.data + self.filled + self.zero + self.hole


class MapCells:
    """The counts of ``number`` cells, 32 bytes each."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.core = _core.ffi.new("struct qm_cell[]", max(1, number))

    def summaries(self) -> bytes:
        """Return ``SUMMARY`` bytes for each cell: see ``qm_summarize_cells``."""
        summaries = bytearray(self.number * SUMMARY)
        with _core.ffi.from_buffer(summaries) as buffer:
            _core.lib.qm_summarize_cells(self.core, self.number, buffer)
        return bytes(summaries)

    def counts(self) -> Counts:
        """Return the sums over all cells."""
        raw = memoryview(_core.ffi.buffer(self.core, self.number * 32)).cast("I")
        # Each cell: 8 bytes of entropy, then six numbers of 32 bits.
        return Counts(*(sum(raw[2 + field :: 8]) for field in range(6)))


class MapPart:
    """A part of one block on a map: ``memory``, whole pages of ``page_size``.

    Its first page is in cell ``first_cell``, behind ``lead`` pages that a cell of ``cell_pages`` has room
    for. Raises UsageError if ``cells`` are too few. Close it; the snapshot must stay open.
    """

    def __init__(
        self,
        name: str,
        memory: SnapshotMemory,
        page_size: int,
        cells: MapCells,
        *,
        first_cell: int,
        lead: int,
        cell_pages: int,
    ) -> None:
        self.name, self.page_size, self.npages = name, page_size, memory.length // page_size
        ncells = -(-(lead + self.npages) // cell_pages)
        if not (0 <= lead < cell_pages < 1 << 32 and 0 <= first_cell <= cells.number - ncells):
            raise UsageError(f"{self.npages} pages of block {name!r} do not fit into the cells")
        self._cells = cells  # the core has a pointer into it
        self._memory = OpenMemory(name, memory, writable=False)
        self._core = _core.ffi.new("struct qm_page_map *")
        self._core.memory, self._core.npages = self._memory.core, self.npages
        self._core.page_size, self._core.lead = page_size, lead
        self._core.cell_pages = cell_pages
        self._core.cells, self._core.ncells = cells.core + first_cell, ncells

    @property
    def levels(self) -> tuple[int, ...]:
        """Data pages by their entropy, in levels of half a bit a byte."""
        return tuple(self._core.levels)

    def core(self, channels: Channels) -> Any:
        """Return the structure of the core, for a job of these channels."""
        self._core.job = channels.core.core
        return self._core

    def add_changed(self, bits: Bitmap, first: int) -> None:
        """Count the set bits from ``first`` on, one for each page of the part, as changed pages."""
        self._add(bits, first, _core.lib.QM_CHANGED)

    def add_touched(self, bits: Bitmap, first: int) -> None:
        """Count the set bits from ``first`` on, one for each page of the part, as touched pages."""
        self._add(bits, first, _core.lib.QM_TOUCHED)

    def _add(self, bits: Bitmap, first: int, field: int) -> None:
        if first < 0 or first + self.npages > bits.npages:
            raise UsageError(f"pages {first} to {first + self.npages} of {bits.npages}")
        _core.lib.qm_map_bits(self._core, bits.core, first, field)

    def close(self) -> None:
        self._memory.close()


def map_pages(
    channels: Channels, parts: Sequence[MapPart], failed: Callable[[int, str], BaseException]
) -> None:
    """Count the pages of all parts; wait.

    ``failed(number, block)`` returns the exception for pages that cannot be read: the errno and the name
    of the block. Raises that, MemoryError, Cancelled.
    """
    cores = [part.core(channels) for part in parts]

    def count(channel: Channel, item: Range) -> int:
        return _core.lib.qm_map_pages(
            cores[item.block], channel.core, item.first, item.npages, channel.fault.core
        )

    names = [part.name for part in parts]
    channels.run_readers(
        _ranges(parts), count, names, lambda number, _fault, block: failed(number, block)
    )


def _ranges(parts: Sequence[MapPart]) -> Iterator[Range]:
    for number, part in enumerate(parts):
        yield from split_ranges(number, part.npages, part.page_size)
