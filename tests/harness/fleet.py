"""Many small snapshots, some of them damaged."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pyqmigrate
from tests.harness.snapshots import ram

__all__ = ["COMMAND", "damage", "make_fleet"]

COMMAND = [sys.executable, "-m", "pyqmigrate", "fleet"]


def make_fleet(
    directory: Path, count: int, damaged: int, *, pages: int = 40, linked: bool = False
) -> list[Path]:
    """Make ``count`` sealed snapshots and return those of them that are damaged, evenly spread.

    linked: the others are links to one file, which takes less time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"guest-{number:03}.mapped" for number in range(count)]
    blocks = [pyqmigrate.RamBlock("pc.ram", ram(pages, seed=1))]
    pyqmigrate.save(paths[0], blocks, seal="xxh3-128", machine="pc-q35-10.0")
    bad = paths[1 :: count // damaged][:damaged] if damaged else []
    for path in paths[1:]:
        copy(paths[0], path, link=linked and path not in bad)
    for path in bad:
        damage(path)
    return bad


def copy(snapshot: Path, other: Path, *, link: bool = False) -> None:
    """Copy a snapshot with its seal and its times."""
    for suffix in ("", ".seal"):
        make = os.link if link else shutil.copy2
        make(f"{snapshot}{suffix}", f"{other}{suffix}")


def damage(path: Path) -> None:
    """Flip a bit of a page; nothing but the bytes tells."""
    info = path.stat()
    with pyqmigrate.open_snapshot(path) as snapshot:
        (block,) = snapshot.blocks.values()
        first = next(start for start, _, data in block.runs() if data)
        offset = block.layout.pages_offset + first * block.page_size + 100
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
