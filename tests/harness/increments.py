"""Increments made from two whole snapshots of one guest: what the second has otherwise.

base, later = save_twice(setup, directory)
write_increment(base, later, directory / "inc", mapped=("pc.ram",))
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.mapped_ram import MappedRamBlock, MappedRamSnapshot
from pyqmigrate.snapshot.save.increment import Base, IncrementWriter
from pyqmigrate.snapshot.save.writer import SaveOptions
from pyqmigrate.vm.guest.device_state import sections_of
from tests.harness.writing_guest import GuestSetup, start

__all__ = ["save_twice", "write_increment"]

_AT_ONCE = 16 << 20


def save_twice(setup: GuestSetup, directory: Path, pages: int = 500) -> tuple[Path, Path]:
    """Run a guest; return two of its snapshots, between which it wrote ``pages`` pages or more."""
    base, later = directory / "base.mapped", directory / "later.mapped"
    with start(setup, directory, rate=20e6) as guest:
        guest.save(base)
        guest.execute("cont")
        guest.wait_for_writes(pages)
        guest.save(later)
    return base, later


def write_increment(base: Path, later: Path, path: Path, mapped: Collection[str]) -> None:
    """Write what ``later`` has otherwise than ``base``; only blocks ``mapped`` are not whole."""
    with (
        MappedRamSnapshot(StreamFile.open(base)) as lower,
        MappedRamSnapshot(StreamFile.open(later)) as upper,
        contextlib.ExitStack() as stack,
    ):
        selections: list[Bitmap | None] = []
        for block in upper.blocks.values():
            if block.name in mapped:
                bitmap = _differences(block, lower.blocks[block.name])
                stack.callback(bitmap.close)
                selections.append(bitmap)
            else:
                selections.append(None)
        blocks = [RamBlock(b.name, b.memory(), b.page_size) for b in upper.blocks.values()]
        stream = upper.stream
        options = SaveOptions(
            machine=stream.machine, target_page_bits=stream.target_page_bits, uuid=stream.uuid
        )
        writer = IncrementWriter(path, blocks, options, Base.of(lower))
        with contextlib.closing(writer):
            writer.begin()
            writer.write_pages(selections)
            writer.finish(sections_of(upper.source, stream))


def _differences(block: MappedRamBlock, other: MappedRamBlock) -> Bitmap:
    differs = np.zeros(block.num_pages, dtype=bool)
    for offset in range(0, block.length, _AT_ONCE):
        length = min(_AT_ONCE, block.length - offset)
        ours, theirs = (
            np.frombuffer(b.read(offset, length), dtype="<u8").reshape(-1, b.page_size // 8)
            for b in (block, other)
        )
        first = offset // block.page_size
        differs[first : first + len(ours)] = (ours != theirs).any(axis=1)
    bitmap = Bitmap(block.num_pages)
    packed = np.packbits(differs, bitorder="little")
    bitmap.fill(memoryview(bytes(packed).ljust(bitmap.nbytes, b"\0")))
    return bitmap
