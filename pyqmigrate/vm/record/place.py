"""The path of the record of a save. A module of its own, since a restore without one needs no more."""

from __future__ import annotations

import os
from pathlib import Path

from pyqmigrate.io.place import resolve_symlink
from pyqmigrate.io.target import target_path

__all__ = ["SUFFIX", "record_path"]

SUFFIX = ".vm.json"
_NAME_MAX = 255  # bytes of a name, on Linux file systems


def record_path(snapshot: str | os.PathLike[str]) -> Path:
    """Return the path of a snapshot's record: beside it, or beside the target of a symbolic link.

    A name that would be too long with the suffix is cut, and gets a checksum.
    """
    path = resolve_symlink(target_path(snapshot))
    name = os.fsencode(path.name)
    if len(name) + len(SUFFIX) > _NAME_MAX:
        import zlib  # a restore waits for each import

        checksum = f".{zlib.crc32(name):08x}"
        front = name[: _NAME_MAX - len(SUFFIX) - len(checksum)].decode("utf-8", "ignore")
        return path.with_name(front + checksum + SUFFIX)
    return path.with_name(path.name + SUFFIX)
