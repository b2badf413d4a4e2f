"""The result of a scan: what is in each cell of a snapshot's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pyqmigrate.analysis.areas import Area, By
from pyqmigrate.io.page_map import SUMMARY, Counts

__all__ = ["Cell", "MappedArea", "MemoryMap"]


@dataclass(frozen=True, slots=True)
class Cell:
    """Shares of the pages of a cell, 0 to 1. What is left is holes: pages that are not stored, and zero.

    ``filled`` pages are one 64-bit word again and again, ``zero`` ones are stored zeros. ``entropy`` is
    the mean of the data pages in bits a byte, 0 to 8. ``mapped`` is False if no memory is there.
    """

    mapped: bool
    data: float
    filled: float
    zero: float
    entropy: float
    changed: float
    touched: float


@dataclass(frozen=True)
class MappedArea:
    """An area with ``cells``, ``SUMMARY`` bytes each; :meth:`cell` reads one of them."""

    area: Area
    cells: bytes

    def __len__(self) -> int:
        return len(self.cells) // SUMMARY

    def cell(self, number: int) -> Cell:
        """Return cell ``number``, from 0 on. Raises IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(f"cell {number} of {len(self)}")
        raw = self.cells[number * SUMMARY : (number + 1) * SUMMARY]
        data, filled, zero = (value / 255 for value in raw[1:4])
        return Cell(bool(raw[0]), data, filled, zero, raw[4] / 32, raw[5] / 255, raw[6] / 255)


@dataclass(frozen=True)
class MemoryMap:
    """The memory of ``snapshot`` (its name) in cells of ``cell_size`` bytes.

    ``against``: what changed pages are compared with, the name of a snapshot; None if nothing is.
    ``by``: the order. ``page_sizes`` of the blocks that are shown, in bytes. ``pages``: how many of
    each class there are. ``levels``: data pages by entropy, from 0 on, half a bit a byte each.
    ``working_set``: whether touched pages are known. ``bytes_read``, ``seconds``. ``notes`` are
    sentences for the user.
    """

    snapshot: str
    against: str | None
    machine: str
    by: By
    cell_size: int
    areas: tuple[MappedArea, ...]
    page_sizes: dict[str, int]
    pages: Counts
    levels: tuple[int, ...]
    working_set: bool
    bytes_read: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Bytes of memory that are shown."""
        return sum(part.length for mapped in self.areas for part in mapped.area.parts)

    def to_json(self, *, areas: bool = True) -> dict[str, Any]:
        """Return values for JSON. ``areas`` says whether the cells are among them."""
        data: dict[str, Any] = {
            "snapshot": self.snapshot,
            "against": self.against,
            "machine": self.machine,
            "by": str(self.by),
            "length": self.length,
            "cell_size": self.cell_size,
            "counts": _counts(self.pages),
            "levels": list(self.levels),
            "working_set": self.working_set,
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
        if areas:
            data["areas"] = [_area(mapped) for mapped in self.areas]
        return data


def _area(mapped: MappedArea) -> dict[str, Any]:
    area = mapped.area
    return {
        "block": area.block,
        "start": area.start,
        "end": area.end,
        "parts": [asdict(part) for part in area.parts],
        "cells": [_cell(cell) for cell in _cells(mapped)],
    }


def _cells(mapped: MappedArea) -> Iterator[Cell]:
    return (mapped.cell(number) for number in range(len(mapped)))


def _cell(cell: Cell) -> dict[str, Any]:
    shares = {
        f"{name}_share": round(getattr(cell, name), 3)
        for name in ("data", "filled", "zero", "changed", "touched")
    }
    return {"mapped": cell.mapped, **shares, "entropy": round(cell.entropy, 2)}


def _counts(pages: Counts) -> dict[str, int]:
    return {
        "data_pages": pages.data,
        "filled_pages": pages.filled,
        "stored_zero_pages": pages.zero,
        "hole_pages": pages.hole,
        "changed_pages": pages.changed,
        "touched_pages": pages.touched,
    }
