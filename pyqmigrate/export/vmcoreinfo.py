"""Search for Linux's VMCOREINFO in the memory of a guest while it is exported.

It is at the start of a page, and only the kernel's symbols say of which one. The core checks the start
of every page that the export reads, so that memory is not read a second time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyqmigrate import _core
from pyqmigrate.format.dump.vmcoreinfo import HEAD_LENGTH, head_pattern, note_length
from pyqmigrate.io.memory import SnapshotMemory
from pyqmigrate.snapshot.base import Block, Snapshot

__all__ = ["VmcoreinfoSearch"]

_PAGE = 4096  # the smallest of Linux
_NOWHERE = (1 << 64) - 1


class VmcoreinfoSearch:
    """One search, in the memories that :meth:`watched` returns; :meth:`note` is its result."""

    def __init__(self, snapshot: Snapshot, *, big_endian: bool = False) -> None:
        self._blocks = snapshot.blocks
        self._big_endian = big_endian
        head, mask = head_pattern(big_endian=big_endian)
        self._head = _core.ffi.new("unsigned char[]", head)
        self._mask = _core.ffi.new("unsigned char[]", mask)
        self._watches: dict[str, Any] = {}

    def watched(self, block: Block, memory: SnapshotMemory) -> SnapshotMemory:
        """Return the same memory, the whole block's, with a search in everything that is read."""
        watch = _core.ffi.new("struct qm_search *")
        watch.fill, watch.next, watch.arg = memory.fill, memory.next, memory.argument
        watch.head, watch.mask, watch.len = self._head, self._mask, HEAD_LENGTH
        watch.step, watch.found = _PAGE, _NOWHERE
        self._watches[block.name] = watch
        return replace(
            memory,
            fill=_core.ffi.addressof(_core.lib, "qm_search_fill"),
            next=_core.ffi.addressof(_core.lib, "qm_search_next"),
            argument=watch,
            kept=(memory, self._head, self._mask),
        )

    def note(self) -> bytes:
        """Return the VMCOREINFO at the lowest offset of the first block with one. Empty if there is
        none, or its length is invalid.

        Raises SnapshotError and TargetError if it cannot be read again.
        """
        for name, block in self._blocks.items():
            watch = self._watches.get(name)
            if watch is None or watch.found == _NOWHERE:
                continue
            at = int(watch.found)
            head = block.read(at, min(HEAD_LENGTH, block.length - at))
            length = note_length(head, big_endian=self._big_endian)
            if length is not None and at + length <= block.length:
                return block.read(at, length)
        return b""
