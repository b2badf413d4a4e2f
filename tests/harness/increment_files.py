"""Bases and increments of them, made for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pyqmigrate
from pyqmigrate import RamBlock, open_snapshot
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.snapshot.save.increment import Base, IncrementWriter
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport

__all__ = ["MACHINE", "base_of", "bitmap_of", "save_base", "save_increment"]

MACHINE = "pc-q35-10.0"


def base_of(path: Path) -> Base:
    """Describe the base at ``path``."""
    with open_snapshot(path) as snapshot:
        assert isinstance(snapshot, MappedRamSnapshot)
        return Base.of(snapshot)


def bitmap_of(bits: npt.NDArray[np.bool_]) -> Bitmap:
    """Make a bitmap of these bits."""
    bitmap = Bitmap(len(bits))
    bitmap.fill(memoryview(np.packbits(bits, bitorder="little").tobytes()))
    return bitmap


def save_base(path: Path, memories: Mapping[str, Any], *, page_size: int = 4096) -> None:
    blocks = [RamBlock(name, memory, page_size) for name, memory in memories.items()]
    pyqmigrate.save(path, blocks, machine=MACHINE)


def save_increment(
    target: pyqmigrate.Descriptors | Path,
    base: Path,
    memories: Mapping[str, Any],
    changed: Mapping[str, npt.NDArray[np.bool_]],
    *,
    page_size: int = 4096,
    sections: bytes = b"",
    description: bytes | None = None,
    observer: Any = None,
    **options: Any,
) -> SaveReport:
    """Save the pages that ``changed`` names; blocks that are not in it are saved whole."""
    blocks = [RamBlock(name, memory, page_size) for name, memory in memories.items()]
    selections = [bitmap_of(changed[name]) if name in changed else None for name in memories]
    options.setdefault("machine", MACHINE)
    writer = IncrementWriter(target, blocks, SaveOptions(**options), base_of(base), observer)
    with contextlib.closing(writer):
        writer.begin()
        writer.write_pages(selections)
        return writer.finish(sections, description)
