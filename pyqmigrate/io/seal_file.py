"""How the seal of a file is recognised, so that it can be removed when the file changes."""

from __future__ import annotations

from pyqmigrate.format.seal import is_seal
from pyqmigrate.io.own_files import FileKind

__all__ = ["SEAL"]

SEAL = FileKind("seal", is_seal, may_be_empty=False)
