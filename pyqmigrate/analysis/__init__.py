"""Compare snapshots, and look into a guest's memory.

Modules are imported on first use, as in :mod:`pyqmigrate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqmigrate import lazy_names

if TYPE_CHECKING:
    from pyqmigrate.analysis.areas import By, Extent
    from pyqmigrate.analysis.comparison import diff
    from pyqmigrate.analysis.map_report import Cell, MappedArea, MemoryMap
    from pyqmigrate.analysis.matchers import Match
    from pyqmigrate.analysis.physical_memory import PhysicalMemory
    from pyqmigrate.analysis.picture.file import PictureForm, check_place, write_picture
    from pyqmigrate.analysis.scan import memory_map
    from pyqmigrate.analysis.search import Search, find
    from pyqmigrate.analysis.text_search import Text, TextSearch, strings

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
    "find",
    "Search",
    "Match",
    "strings",
    "TextSearch",
    "Text",
    "PhysicalMemory",
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
    "find": "search",
    "Search": "search",
    "Match": "matchers",
    "strings": "text_search",
    "TextSearch": "text_search",
    "Text": "text_search",
    "PhysicalMemory": "physical_memory",
    "diff": "comparison",
}

__getattr__, __dir__ = lazy_names(__name__, _HOME, globals())
