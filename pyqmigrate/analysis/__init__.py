"""Compare snapshots, and look into them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqmigrate.analysis.areas import By, Extent
    from pyqmigrate.analysis.comparison import diff
    from pyqmigrate.analysis.map_report import Cell, MappedArea, MemoryMap
    from pyqmigrate.analysis.picture.file import PictureForm, check_place, write_picture
    from pyqmigrate.analysis.scan import memory_map

__all__ = [
    "memory_map",
    "MemoryMap",
    "MappedArea",
    "Cell",
    "By",
    "Extent",
    "PictureForm",
    "check_place",
    "write_picture",
    "diff",
]

_HOME = {
    "memory_map": "scan",
    "MemoryMap": "map_report",
    "MappedArea": "map_report",
    "Cell": "map_report",
    "By": "areas",
    "Extent": "areas",
    "PictureForm": "picture.file",
    "check_place": "picture.file",
    "write_picture": "picture.file",
    "diff": "comparison",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
