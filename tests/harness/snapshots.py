"""Guests and snapshots of them, made for tests."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

import pyqmigrate
from tests.harness.kernel import guest

__all__ = [
    "KNOWN",
    "SLOW",
    "Bytes",
    "data_bytes",
    "known_memory",
    "load",
    "ram",
    "save_known",
    "turn_bitmaps",
]

Bytes = npt.NDArray[np.uint8]

KNOWN = 512  # pages of known_memory
SLOW = 1 << 20  # bytes a second: a job over known_memory then lasts more than a second


def ram(
    npages: int, *, density: float = 0.6, page_size: int = 4096, seed: int = 0, shift: int = 0
) -> Bytes:
    """Memory of which about ``density`` pages hold data."""
    bits = np.random.default_rng(seed).random(npages) < density
    return guest(bits, page_size, seed, shift)


def known_memory(seed: int = 0) -> Bytes:
    """2 MiB, a bit more than half of them data."""
    return ram(KNOWN, seed=seed)


def save_known(path: Path, seed: int = 0, **options: object) -> Bytes:
    """Save known_memory as block ``ram``; returns it."""
    memory = known_memory(seed)
    pyqmigrate.save(path, [pyqmigrate.RamBlock("ram", memory)], **options)  # type: ignore[arg-type]
    return memory


def load(path: Path | str | pyqmigrate.Descriptors, **options: object) -> dict[str, Bytes]:
    """Load all blocks into buffers that were not zero before."""
    with pyqmigrate.open_snapshot(path) as snapshot:
        snapshot.verify()
        memories = {
            name: np.full(block.length, 0x77, dtype=np.uint8)
            for name, block in snapshot.blocks.items()
        }
        snapshot.load(memories, **options)  # type: ignore[arg-type]
    return memories


def turn_bitmaps(path: Path) -> None:
    """Write the bitmaps as a host of the other byte order would."""
    with pyqmigrate.open_snapshot(path) as snapshot, path.open("r+b") as file:
        for block in snapshot.blocks.values():
            file.seek(block.bitmap_offset)
            words = np.frombuffer(file.read(block.layout.bitmap_size), dtype="<u8")
            file.seek(block.bitmap_offset)
            file.write(words.astype(">u8").tobytes())


def data_bytes(path: Path, start: int, end: int) -> int:
    """Bytes of ``[start, end)`` that are not in a hole."""
    fd = os.open(path, os.O_RDONLY)
    found, at = 0, start
    try:
        while at < end:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                break
            stop = min(os.lseek(fd, at, os.SEEK_HOLE), end)
            found += max(stop - at, 0)
            at = stop
    finally:
        os.close(fd)
    return found
