"""Search for Linux's VMCOREINFO in the memory of a guest.

It is at the start of a page, and only the kernel's symbols say of which one. The core checks the start
of every page that is read: by an export, so that memory is not read a second time, or by
:func:`find_vmcoreinfo`, which reads until it is found.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import replace

from pyqmigrate.core import PatternSearch
from pyqmigrate.format.dump.vmcoreinfo import HEAD_LENGTH, head_pattern, note_length
from pyqmigrate.io.memory import SnapshotMemory
from pyqmigrate.snapshot.base import Block, Snapshot, error_from_errno

__all__ = ["VmcoreinfoSearch", "find_vmcoreinfo"]

_PAGE = 4096  # the smallest of Linux
_PIECE = 4 << 20  # bytes that are read at once


class VmcoreinfoSearch:
    """One search, in the memories that :meth:`watched` returns; :meth:`note` is its result."""

    def __init__(self, snapshot: Snapshot, *, big_endian: bool = False) -> None:
        self._blocks = snapshot.blocks
        self._big_endian = big_endian
        self._head, self._mask = head_pattern(big_endian=big_endian)
        self._searches: dict[str, PatternSearch] = {}

    def watched(self, block: Block, memory: SnapshotMemory) -> SnapshotMemory:
        """Return the same memory, the whole block's, with a search in everything that is read."""
        search = PatternSearch(memory.source, self._head, self._mask, _PAGE)
        self._searches[block.name] = search
        return replace(memory, source=search.source)

    def note(self) -> bytes:
        """Return the VMCOREINFO at the lowest offset of the first block with one. Empty if there is
        none, or its length is invalid.

        Raises SnapshotError and TargetError if it cannot be read again.
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


def find_vmcoreinfo(
    snapshot: Snapshot, blocks: Iterable[Block], *, big_endian: bool = False
) -> bytes:
    """Return the VMCOREINFO of a guest, the whole note; empty if there is none.

    The data pages of ``blocks`` are read until it is found. Raises SnapshotError and TargetError if
    they cannot be read.
    """
    search = VmcoreinfoSearch(snapshot, big_endian=big_endian)
    for block in blocks:
        source = search.watched(block, block.memory()).source
        for first, end, has_data in block.runs():
            if not has_data:
                continue
            start, stop = first * block.page_size, end * block.page_size
            for offset in range(start, stop, _PIECE):
                try:
                    source.read(offset, min(_PIECE, stop - offset))
                except OSError as error:
                    number = error.errno or errno.EIO
                    raise error_from_errno(number, snapshot.source, block.name) from None
                if note := search.note():
                    return note
    return b""
