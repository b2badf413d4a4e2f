"""Sealed snapshots, and ways to damage them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import pyqmigrate
from pyqmigrate.integrity.verify import SealCheck
from tests.harness.snapshots import Bytes, ram

__all__ = ["PAGE", "Sealed", "damage", "flip", "replaced"]

PAGE = 4096
MIB = 1 << 20


@dataclass(frozen=True)
class Sealed:
    """A sealed snapshot with blocks ``big``, of more than 4 MiB, and ``small``."""

    path: Path
    big: Bytes
    small: Bytes

    @classmethod
    def make(cls, path: Path, *, density: float = 0.6, **options: object) -> Sealed:
        big, small = ram(1100, density=density), ram(20, seed=1)
        blocks = [pyqmigrate.RamBlock("big", big), pyqmigrate.RamBlock("small", small)]
        settings = {"seal": "xxh3-128", "machine": "pc-q35-10.0"} | options
        pyqmigrate.save(path, blocks, **settings)  # type: ignore[arg-type]
        return cls(path, big, small)

    @property
    def seal(self) -> Path:
        return self.path.with_name(f"{self.path.name}.seal")

    def block(self, name: str) -> tuple[int, int]:
        """Where its bitmap and its pages are."""
        with pyqmigrate.open_snapshot(self.path) as snapshot:
            return snapshot.blocks[name].bitmap_offset, snapshot.blocks[name].pages_offset

    def check(self) -> SealCheck:
        found = pyqmigrate.verify_seal(self.path)
        assert found is not None
        return found

    def write(self, at: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def read(self, at: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(at)
            return file.read(length)

    def stale(self, name: str, count: int) -> list[int]:
        """Puts bytes under ``count`` clear bits of a block; which pages."""
        _, pages = self.block(name)
        memory = {"big": self.big, "small": self.small}[name].reshape(-1, PAGE)
        clear = np.flatnonzero(~memory.any(axis=1))[:count]
        for page in clear:
            self.write(pages + int(page) * PAGE + 7, b"old")
        return [int(page) for page in clear]


def flip(data: bytearray, bit: int) -> None:
    data[bit // 8] ^= 1 << bit % 8


def damage(data: bytearray, rng: random.Random) -> str:
    """Damages a file in one way; says how."""
    kind, at = rng.randrange(7), rng.randrange(len(data))
    length = rng.choice([1, 8, 512, PAGE, 3 * PAGE, MIB, rng.randrange(1, len(data))])
    match kind:
        case 0:
            flip(data, rng.randrange(len(data) * 8))
            return "a flipped bit"
        case 1:
            del data[at:]
            return f"a cut at {at}"
        case 2:
            data += rng.randbytes(length) if rng.randrange(2) else bytes(length)
            return f"{length} bytes more"
        case 3:
            data[at:at] = rng.randbytes(length)
            return f"{length} bytes put in at {at}"
        case 4:
            del data[at : at + length]
            return f"{length} bytes taken out at {at}"
        case 5:
            one, other = (rng.randrange(len(data) // PAGE) * PAGE for _ in range(2))
            pages = data[one : one + PAGE], data[other : other + PAGE]
            data[one : one + PAGE], data[other : other + PAGE] = reversed(pages)
            return f"pages at {one} and {other} swapped"
        case _:
            end = min(at + length, len(data))
            data[at:end] = bytes(end - at) if rng.randrange(2) else rng.randbytes(end - at)
            return f"{end - at} bytes overwritten at {at}"


def replaced(path: Path, data: bytes, times: tuple[int, int]) -> None:
    """Other content, with the times of the old: nothing but the bytes tells."""
    path.write_bytes(data)
    os.utime(path, ns=times)
