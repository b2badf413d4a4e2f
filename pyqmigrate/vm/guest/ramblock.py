"""Parse the table of ``info ramblock``: QEMU's RAM blocks, in the order of a stream.

Blocks without a name are not migrated, and are left out.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pyqmigrate.errors import QemuError

__all__ = ["RamLine", "compile_patterns", "parse_ramblock"]

# Patterns are strings, compiled when first used: a restore waits for each import.
_LINE = (
    r"(?i) *(?P<name>.*?) +(?P<page>\d+ [KMGT]?i?B) +0x[0-9a-f]+ +0x(?P<used>[0-9a-f]+)"
    r" +0x(?P<total>[0-9a-f]+)(?: +0x(?P<host>[0-9a-f]+))?(?: +\S+)* *"
)
_HEAD = r"\s*Block Name\s+PSize\s"
_UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


class RamLine(NamedTuple):
    """A line of ``info ramblock``; ``length`` is the used size. Address 0: none is given.

    ``largest`` is the size that an incoming stream may set; 0 if unknown.
    """

    name: str
    page_size: int
    length: int
    host_address: int
    largest: int = 0

    def takes(self, length: int) -> bool:
        """Return whether an incoming block of this length fits.

        QEMU resizes blocks with room to grow, which are the firmware's tables. It would accept
        other sizes too, and corrupt the memory.
        """
        if self.length == length:
            return True
        can_change = self.name.startswith("/rom@") or self.length < self.largest
        return can_change and length <= self.largest


def compile_patterns() -> None:
    """Prepare for :func:`parse_ramblock`, which takes longer the first time."""
    for pattern in (_LINE, _HEAD):
        re.compile(pattern)


def parse_ramblock(text: str) -> list[RamLine]:
    """Return the named lines of ``info ramblock``, in order: the blocks of a stream.

    Raises QemuError for an unknown table format: a block must not be overlooked.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or not re.match(_HEAD, lines[0]):
        raise QemuError(f"unknown format of info ramblock: {text[:200]!r}")
    return [parsed for line in lines[1:] if (parsed := _parse_line(line)).name]


def _parse_line(line: str) -> RamLine:
    match = re.fullmatch(_LINE, line)
    if match is None:
        raise QemuError(f"invalid line of info ramblock: {line!r}")
    number, unit = match["page"].split()
    return RamLine(
        match["name"],
        int(number) << _UNITS[unit],
        int(match["used"], 16),
        int(match["host"] or "0", 16),
        int(match["total"], 16),
    )
