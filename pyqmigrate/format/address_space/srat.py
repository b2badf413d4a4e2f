"""The order of a guest's NUMA nodes, from the table that QEMU makes for the firmware.

A stream lists blocks by size, and the backends of a guest may have any names. The System Resource
Affinity Table says how much memory each node has, in order of address (ACPI 6.5, 5.2.16)::

    "SRAT", u32 length of the table, ... 48 bytes in all, then entries: u8 type, u8 length, ...
    memory, type 1, 40 bytes: +2 u32 node, +8 u64 base, +16 u64 length, +28 u32 flags (1: enabled)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["nodes_in_order"]

_SIGNATURE = b"SRAT"
_HEAD = 48
_MEMORY = struct.Struct("<BBI2xQQ4xI8x")
_MEMORY_TYPE = 1
_ENABLED, _HOT_PLUGGABLE = 1, 2
_NODES_MAX = 128  # in any QEMU
_NAME_PARTS = re.compile(r"(\D*)(\d*)")
_LEGACY_HOLE = 0x60000  # 640 KiB to 1 MiB: RAM that the table omits


def nodes_in_order(tables: bytes, backends: Mapping[str, int]) -> list[str] | None:
    """Return the names of the backends, one for each node, by address; None if unknown.

    backends: their lengths, in the order of the stream. Backends of one length are listed in the
        order of their creation; they are taken to be nodes in that order if their names ascend too.
    """
    if len(backends) > _NODES_MAX:
        return None
    sizes: dict[int, int] = {}
    for _, node, length in sorted(_ranges(tables)):
        sizes[node] = sizes.get(node, 0) + length
    left, ordered = [*backends], []
    for size in sizes.values():
        match = next((n for n in left if 0 <= backends[n] - size <= _LEGACY_HOLE), None)
        if match is None:
            return None
        left.remove(match)
        ordered.append(match)
    if left or not _ascend(ordered, backends):
        return None
    return ordered


def _ascend(ordered: Sequence[str], backends: Mapping[str, int]) -> bool:
    """Return whether the names of backends of one length ascend, numbers by their value."""
    last: dict[int, list[tuple[str, int]]] = {}
    for name in ordered:
        key = [(text, int(number or 0)) for text, number in _NAME_PARTS.findall(name)]
        if key < last.get(backends[name], key):
            return False
        last[backends[name]] = key
    return True


def _ranges(tables: bytes) -> Iterator[tuple[int, int, int]]:
    """Return base, node and length of every range of memory that is enabled at the start."""
    start = tables.find(_SIGNATURE)
    if start < 0:
        return
    end = min(start + int.from_bytes(tables[start + 4 : start + 8], "little"), len(tables))
    start += _HEAD
    while start + 2 <= end and tables[start + 1] >= 2:
        kind, length = tables[start], tables[start + 1]
        if kind == _MEMORY_TYPE and length == _MEMORY.size and start + length <= end:
            _, _, node, base, size, flags = _MEMORY.unpack_from(tables, start)
            if size and flags & _ENABLED and not flags & _HOT_PLUGGABLE:
                yield base, node, size
        start += length
