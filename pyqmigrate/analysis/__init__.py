"""Compare snapshots, and look into a guest's memory.

Modules are imported on first use, as in :mod:`pyqmigrate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqmigrate.analysis.matchers import Match
    from pyqmigrate.analysis.physical_memory import PhysicalMemory
    from pyqmigrate.analysis.search import Search, find
    from pyqmigrate.analysis.text_search import Text, TextSearch, strings

__all__ = ["find", "Search", "Match", "strings", "TextSearch", "Text", "PhysicalMemory"]

_HOME = {
    "find": "search",
    "Search": "search",
    "Match": "matchers",
    "strings": "text_search",
    "TextSearch": "text_search",
    "Text": "text_search",
    "PhysicalMemory": "physical_memory",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
