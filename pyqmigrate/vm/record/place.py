"""Where the record of a save is. Apart from the record, since most restores have none to read."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from pyqmigrate.io.place import resolve_symlink
from pyqmigrate.io.target import target_path

__all__ = ["record_path"]

_SUFFIX = ".vm.json"
_NAME_MAX = 255  # bytes of a name, on Linux file systems


def record_path(snapshot: str | os.PathLike[str]) -> Path:
    """Where the record of a snapshot is: beside it, or beside what a symbolic link leads to.

    Of a name that leaves no room for the suffix, the first part and a checksum are used.
    """
    path = resolve_symlink(target_path(snapshot))
    name = os.fsencode(path.name)
    if len(name) + len(_SUFFIX) > _NAME_MAX:
        checksum = f".{zlib.crc32(name):08x}"
        front = name[: _NAME_MAX - len(_SUFFIX) - len(checksum)].decode("utf-8", "ignore")
        return path.with_name(front + checksum + _SUFFIX)
    return path.with_name(path.name + _SUFFIX)
