"""Search bytes in memory, by the core and without the GIL: a pattern, or printable strings."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from pyqmigrate import _core

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["BytePattern", "StringSearch"]

_MOST = 1 << 16  # results of one call: half a MiB


class BytePattern:
    """Occurrences of ``pattern``, at least a byte, that do not overlap, from left to right."""

    def __init__(self, pattern: bytes) -> None:
        self.pattern = pattern
        self._core = _core.ffi.new("unsigned char[]", pattern)

    def find(self, data: Buffer, start: int, end: int) -> tuple[array[int], int]:
        """Return the positions of occurrences that start in ``[start, end)``, and where to go on.

        That is ``end``, unless there were too many for one call.
        """
        with _Call(data, _MOST) as call:
            count = _core.lib.qm_find(
                call.data, len(call.data), start, end, self._core, len(self.pattern),
                call.found, _MOST, call.next,
            )  # fmt: skip
            return call.result(count)


class StringSearch:
    """Runs of at least ``least`` printable characters, of ``width`` bytes (2: UTF-16LE)."""

    def __init__(self, least: int, width: int) -> None:
        self.least, self.width = least, width

    def find(self, data: Buffer, start: int, end: int) -> tuple[array[int], int]:
        """Return the start and the end of each run that starts in ``[start, end)``, in turn, and
        where to go on.

        Runs that touch the edges of that are returned however short they are, and end at the first
        character that starts at ``end`` or later.
        """
        with _Call(data, 2 * _MOST) as call:
            count = _core.lib.qm_strings(
                call.data, len(call.data), start, end, self.least, self.width,
                call.found, _MOST, call.next,
            )  # fmt: skip
            return call.result(2 * count)


class _Call:
    """The arguments of one call of the core that every search has."""

    def __init__(self, data: Buffer, numbers: int) -> None:
        self.data = _core.ffi.from_buffer("unsigned char[]", data)
        self._numbers: array[int] = array("I", bytes(4 * numbers))
        self.found: Any = _core.ffi.from_buffer("uint32_t[]", self._numbers)
        self.next = _core.ffi.new("size_t *")

    def result(self, count: int) -> tuple[array[int], int]:
        if count < 0:
            raise ValueError(f"a search outside of {len(self.data)} bytes")
        return self._numbers[:count], int(self.next[0])

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *_: object) -> None:
        _core.ffi.release(self.data)
        _core.ffi.release(self.found)
