"""Linux's VMCOREINFO, looked for in the memory of a guest while that is exported.

It stands at the start of a page; which one, only the kernel's symbols tell.
"""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Iterator

from pyqmigrate import _core
from pyqmigrate.format.vmcoreinfo import HEAD_LENGTH, first_word, note_length
from pyqmigrate.opened import OpenedBlock, refused_read
from pyqmigrate.opening import AnySnapshot

__all__ = ["VmcoreinfoSearch"]

_PIECE = 4 << 20
_PAGE = 4096  # the smallest of Linux


class VmcoreinfoSearch:
    """One search; ``note`` is what was found, as it is: that of the lowest byte of the first
    block, of several; empty if there was none.

    :meth:`look` may be called by several threads at once, for any parts of memory in any order.
    """

    def __init__(self, snapshot: AnySnapshot, *, big_endian: bool = False) -> None:
        self._snapshot = snapshot
        self._big_endian = big_endian
        self._word = int.from_bytes(first_word(big_endian=big_endian), sys.byteorder)
        self._order = {name: number for number, name in enumerate(snapshot.blocks)}
        self._lock = threading.Lock()
        self._best: tuple[tuple[int, int], bytes] | None = None

    @property
    def note(self) -> bytes:
        return b"" if self._best is None else self._best[1]

    def look(self, block: OpenedBlock, start: int, end: int) -> None:
        """Look through bytes ``[start, end)`` of a block, whole pages of it.

        Raises SnapshotError and TargetError when they cannot be read.
        """
        if self._is_beaten(block, start):
            return
        for at in self._candidates(block, start, end):
            head = block.read(at, min(HEAD_LENGTH, block.length - at))
            length = note_length(head, big_endian=self._big_endian)
            if length is not None and at + length <= block.length:
                note = block.read(at, length)
                with self._lock:
                    if not self._is_beaten(block, at):
                        self._best = self._place(block, at), note
                return

    def _place(self, block: OpenedBlock, at: int) -> tuple[int, int]:
        return self._order[block.name], at

    def _is_beaten(self, block: OpenedBlock, at: int) -> bool:
        return self._best is not None and self._best[0] < self._place(block, at)

    def _candidates(self, block: OpenedBlock, start: int, end: int) -> Iterator[int]:
        """Where pages start with the note's first word."""
        memory = block.memory()
        buffer = _core.ffi.new("char[]", min(_PIECE, end - start))
        words = memoryview(_core.ffi.buffer(buffer)).cast("I")
        while start < end:
            at = memory.next(memory.argument, start, end)
            if at >= end:
                return
            if at >= 0:
                start = at - at % block.page_size
                length = min(len(buffer), end - start)
                got = memory.fill(memory.argument, buffer, start, length)
            else:
                length, got = 0, at
            if got != length:
                raise refused_read(
                    -got if got < 0 else errno.ENODATA, self._snapshot.source, block.name
                )
            first = -start % _PAGE
            heads = words[first // 4 : length // 4 : _PAGE // 4].tolist()
            for n, head in enumerate(heads):
                if head == self._word:
                    yield start + first + n * _PAGE
            start += length
