"""The table that ``info ramblock`` prints: QEMU's RAM blocks, as a stream has them.

A block without a name is not migrated, and is left out.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pyqmigrate.errors import QemuError

__all__ = ["RamLine", "parse_ramblock"]

# Patterns are strings, compiled when first used: a restore waits for each import.
_LINE = (
    r"(?i) *(?P<name>.*?) +(?P<page>\d+ [KMGT]?i?B) +0x[0-9a-f]+ +0x(?P<used>[0-9a-f]+)"
    r" +0x(?P<total>[0-9a-f]+)(?: +0x(?P<host>[0-9a-f]+))?(?: +\S+)* *"
)
_HEAD = r"\s*Block Name\s+PSize\s"
_UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


class RamLine(NamedTuple):
    """A line of ``info ramblock``; ``length`` is what is used now. Address 0: it tells none.

    ``largest`` is what an incoming stream may make of the length; 0 where that is not known.
    """

    name: str
    page_size: int
    length: int
    host_address: int
    largest: int = 0

    def takes(self, length: int) -> bool:
        """Whether an incoming block of this length fits. QEMU resizes what it gave room to grow,
        which is the firmware's tables; it would take other RAM too, and damage it."""
        if self.length == length:
            return True
        can_change = self.name.startswith("/rom@") or self.length < self.largest
        return can_change and length <= self.largest


def parse_ramblock(text: str) -> list[RamLine]:
    """The named lines of ``info ramblock``, in its order: the blocks that a stream has.

    Raises QemuError for a table of another form: a block overlooked would be a block lost.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or not re.match(_HEAD, lines[0]):
        raise QemuError(f"info ramblock has a form that is not known here: {text[:200]!r}")
    return [parsed for line in lines[1:] if (parsed := _parse_line(line)).name]


def _parse_line(line: str) -> RamLine:
    found = re.fullmatch(_LINE, line)
    if found is None:
        raise QemuError(f"a line of info ramblock is not understood: {line!r}")
    number, unit = found["page"].split()
    return RamLine(
        found["name"],
        int(number) << _UNITS[unit],
        int(found["used"], 16),
        int(found["host"] or "0", 16),
        int(found["total"], 16),
    )
