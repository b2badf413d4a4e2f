"""The layout of an image: where the rows of each area are, and the labels beside them, in pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyqmigrate.analysis.map_report import MemoryMap
from pyqmigrate.analysis.picture.colours import Painter
from pyqmigrate.analysis.picture.labels import names_of
from pyqmigrate.analysis.picture.rows import Row, rows_of

__all__ = ["Band", "Label", "Sheet", "pixels_of", "sheet_of"]

_WIDTH = 1024  # of the rows
LEFT = 108  # for addresses
RIGHT = 232  # for names
TOP = 46  # for the title
LINE = 15  # of a label
LEGEND_LINE = 20
_GAP = 10  # between areas
_NAME = 30  # characters


@dataclass(frozen=True)
class Label:
    """A text at a height, the middle of it."""

    y: float
    text: str


@dataclass(frozen=True)
class Band:
    """The rows of one area, from ``y`` on, ``cell`` pixels each."""

    y: int
    rows: tuple[Row, ...]
    cell: int

    @property
    def height(self) -> int:
        return len(self.rows) * self.cell


@dataclass(frozen=True)
class Sheet:
    """An image of ``width`` and ``height``: ``bands``, their ``addresses`` on the left, ``names`` on the
    right, and a legend from ``legend`` on."""

    width: int
    height: int
    columns: int
    bands: tuple[Band, ...]
    addresses: tuple[Label, ...]
    names: tuple[Label, ...]
    legend: int


def sheet_of(found: MemoryMap, entries: int) -> Sheet:
    """Lay out an image with a legend of ``entries`` lines."""
    number = sum(len(mapped) for mapped in found.areas)
    columns = next((n for n in (64, 128, 256, 512) if number <= n * n), _WIDTH)
    cell = _WIDTH // columns
    bands, addresses, names = [], [], []
    y, lowest = TOP, 0.0
    for rows in _areas(rows_of(found, columns)):
        band = Band(y, rows, cell)
        bands.append(band)
        step = _step(cell)
        for place, row in enumerate(rows):
            middle = y + (place + 0.5) * cell if cell >= LINE else y + place * cell + LINE / 2
            if place % step == 0 and (place == 0 or y + band.height - middle >= LINE / 2):
                addresses.append(Label(middle, f"{row.start:#x}"))
            if row.names:
                text = names_of(row.names, _NAME)
                lowest = max(middle, lowest + LINE)
                names.append(Label(lowest, f"block {text}" if row.block is not None else text))
        y += max(band.height, LINE) + _GAP
    bottom = max(y, round(lowest + LINE))
    height = bottom + (entries + 1) // 2 * LEGEND_LINE + 14
    return Sheet(
        LEFT + _WIDTH + RIGHT,
        height,
        columns,
        tuple(bands),
        tuple(addresses),
        tuple(names),
        bottom + 8,
    )


def _areas(rows: Iterable[Row]) -> list[tuple[Row, ...]]:
    found: list[list[Row]] = []
    for row in rows:
        if row.first:
            found.append([])
        found[-1].append(row)
    return [tuple(area) for area in found]


def _step(cell: int) -> int:
    """Return every how many rows there is an address: a power of two, with a line for each."""
    step = 1
    while step * cell < 3 * LINE:
        step *= 2
    return step


def pixels_of(band: Band, painter: Painter) -> list[bytes]:
    """Return the pixels of each row, red, green, blue, one for each cell."""
    background = painter.theme.background
    return [b"".join(bytes(painter(cell) or background) for cell in row.cells) for row in band.rows]
