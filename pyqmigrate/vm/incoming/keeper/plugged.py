"""Blocks that QEMU has got since a restore began."""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = ["plugged_in"]

# A line of ``info ramblock``; what is not migrated has no name.
_LINE = r"(?m)^ *(\S.*?) +\d+ [KMGT]?i?B +0x"


def plugged_in(table: str, known: Collection[str]) -> list[str]:
    """Return the names of the blocks in a table of ``info ramblock`` that are not ``known``."""
    return [name for name in re.findall(_LINE, table) if name not in known]
