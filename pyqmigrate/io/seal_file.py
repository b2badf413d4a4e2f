"""Where the seal of a file is: beside it, under its name with ``.seal`` behind it."""

from __future__ import annotations

import os
from pathlib import Path

from pyqmigrate.format.seal import SUFFIX, is_seal
from pyqmigrate.io.own_files import FileKind
from pyqmigrate.io.place import resolve_symlink

__all__ = ["SEAL", "seal_path"]

SEAL = FileKind("seal", is_seal, may_be_empty=False)


def seal_path(snapshot: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a file's seal. Symbolic links to the file are followed."""
    path = resolve_symlink(snapshot)
    return path.with_name(path.name + SUFFIX)
