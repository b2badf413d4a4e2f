"""Linux's VMCOREINFO, looked for in the memory of a guest while that is exported.

It stands at the start of a page; which one, only the kernel's symbols tell. The core looks at the
start of every page that it reads anyway: memory is not read a second time.
"""

from __future__ import annotations

from dataclasses import replace

from pyqmigrate.core import PatternSearch
from pyqmigrate.format.dump.vmcoreinfo import HEAD_LENGTH, head_pattern, note_length
from pyqmigrate.io.memory import SnapshotMemory
from pyqmigrate.snapshot.base import Block, Snapshot

__all__ = ["VmcoreinfoSearch"]

_PAGE = 4096  # the smallest of Linux


class VmcoreinfoSearch:
    """One search; :meth:`note` is what was found in the memories that :meth:`watched` gave."""

    def __init__(self, snapshot: Snapshot, *, big_endian: bool = False) -> None:
        self._blocks = snapshot.blocks
        self._big_endian = big_endian
        self._head, self._mask = head_pattern(big_endian=big_endian)
        self._searches: dict[str, PatternSearch] = {}

    def watched(self, block: Block, memory: SnapshotMemory) -> SnapshotMemory:
        """The same memory, all of this block; what is read of it is looked through."""
        search = PatternSearch(memory.source, self._head, self._mask, _PAGE)
        self._searches[block.name] = search
        return replace(memory, source=search.source)

    def note(self) -> bytes:
        """What was found, as it is: of several, that at the lowest byte of the first block. Empty
        if there was none, or its length is not what it can be.

        Raises SnapshotError and TargetError when it cannot be read again.
        """
        for name, block in self._blocks.items():
            search = self._searches.get(name)
            if search is None or search.found is None:
                continue
            offset = search.found
            head = block.read(offset, min(HEAD_LENGTH, block.length - offset))
            length = note_length(head, big_endian=self._big_endian)
            if length is not None and offset + length <= block.length:
                return block.read(offset, length)
        return b""
