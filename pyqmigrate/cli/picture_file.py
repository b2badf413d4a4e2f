"""Files for pictures: where they may be written, and how."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.io.own_files import check_replaceable, write_whole
from pyqmigrate.io.picture_kinds import PICTURES

__all__ = ["check_picture_place", "write_picture"]


def check_picture_place(path: str, *suffixes: str) -> Path:
    """Return the absolute path for a picture, whose form is that of its suffix.

    Raises UsageError for another suffix than ``suffixes`` and if another kind of file is there,
    TargetError if no file can be created.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise UsageError(f"the name of the picture must end in {' or '.join(suffixes)}: {path!r}")
    place = check_replaceable(path, PICTURES[suffix])
    if not os.access(place.parent, os.W_OK):
        number = errno.EACCES if place.parent.exists() else errno.ENOENT
        raise TargetError(number, "cannot write the picture", path)
    return place


def write_picture(place: Path, path: str, write: Callable[[BinaryIO], object]) -> None:
    """Write the picture at ``place``, which :func:`check_picture_place` returned for ``path``. Raises
    UsageError if another kind of file is there now, TargetError."""
    write_whole(place, PICTURES[Path(path).suffix.lower()], write, sync_name=False)
