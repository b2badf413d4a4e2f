"""A snapshot as the bytes of an ELF core, which are read when they are needed and never written.

    with open_snapshot("/snap/guest.mapped") as snapshot:
        view = ElfView(snapshot, ElfLayout.of(snapshot))
        view.read(0, 64)                                   # an ELF header

The bytes are those of the file that :func:`~pyqmigrate.export.elf.write_elf` writes.
"""

from __future__ import annotations

from bisect import bisect_right

from pyqmigrate.errors import UsageError
from pyqmigrate.export.elf_layout import ElfLayout
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["ElfView"]


class ElfView:
    """The ELF core of an open snapshot, valid until that is closed. Reads may run in several threads.

    ``vmcoreinfo`` is that note, whole (:func:`~pyqmigrate.export.vmcoreinfo.find_vmcoreinfo`), or
    empty. ``size`` is in bytes.
    """

    def __init__(self, snapshot: Snapshot, layout: ElfLayout, vmcoreinfo: bytes = b"") -> None:
        self.snapshot = snapshot
        self.layout = layout
        self.vmcoreinfo = vmcoreinfo
        self.head = layout.head(vmcoreinfo)
        self.size = layout.length
        self._starts = [area.position for area in layout.areas]

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on, fewer at the end of the file.

        Raises UsageError for a negative number, and the errors of :meth:`pyqmigrate.Block.read`.
        """
        if offset < 0 or length < 0:
            raise UsageError(f"{length} bytes at {offset} are not a part of a file")
        end = min(offset + length, self.size)
        parts = []
        while offset < end:
            part = self._part(offset, end)
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, offset: int, end: int) -> bytes:
        """Return some of the bytes ``[offset, end)``, from the first on."""
        if offset < len(self.head):
            return self.head[offset:end]
        number = bisect_right(self._starts, offset) - 1
        following = self._starts[number + 1] if number + 1 < len(self._starts) else self.size
        if number >= 0:
            area = self.layout.areas[number]
            start = offset - area.position
            if start < area.length:
                return area.block.read(area.offset + start, min(end - offset, area.length - start))
        return bytes(min(end, following) - offset)
