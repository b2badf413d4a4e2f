"""The small stream that a QEMU loads whose RAM is already mapped from the snapshot.

It is the snapshot's own stream, at the same offsets, in which the bitmaps of the mapped blocks are
clear: QEMU leaves their pages alone on ``-incoming``. Everything else is copied: framing, device
state, the other blocks. It lives in memory, without a name, and is nearly all hole.

A page whose bit is clear in the snapshot is zero for the guest, but the file may hold old bytes
there (a live save leaves them). For such a page the companion has its bit set over a hole, so that
QEMU reads zeros into its private copy. They are found by reading what the file holds under clear
bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection

from pyqmigrate.core import File
from pyqmigrate.errors import SnapshotError, target_error
from pyqmigrate.io import pages
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.holes import next_data
from pyqmigrate.io.pages import StoredPages
from pyqmigrate.snapshot.mapped_ram import MappedRamBlock, MappedRamSnapshot

__all__ = ["IncomingStream"]

_WINDOW = 1 << 20  # bytes copied at a time


class IncomingStream:
    """The stream for a QEMU that maps the blocks ``mapped`` of ``snapshot``. Close it.

    ``snapshot_fd`` is the snapshot's file, open for reading; its position is moved. After
    :meth:`build`, ``stale_pages`` are those that had to be marked, and finding them took
    ``stale_seconds``. With ``sealed`` a seal says that there are none, and they are not looked for.
    """

    def __init__(
        self,
        snapshot: MappedRamSnapshot,
        snapshot_fd: int,
        mapped: Collection[str],
        *,
        channels: int = 2,
        sealed: bool = False,
    ) -> None:
        self.sealed = sealed
        self.stale_pages = 0
        self.stale_seconds = 0.0
        self._snapshot = snapshot
        self._source = snapshot_fd
        self._mapped = mapped
        self._channels = Channels(channels, "pyqmigrate-stale")
        self.fd = os.memfd_create("companion", os.MFD_CLOEXEC)

    def build(self) -> None:
        """Write it. Blocks; :meth:`cancel` from another thread ends it with Cancelled.

        Raises SnapshotError for bad bitmaps, TargetError when a file cannot be read or written.
        """
        try:
            self._copy_framing()
            for block in self._snapshot.blocks.values():
                if block.name not in self._mapped:
                    self._copy(block.bitmap_offset, block.layout.bitmap_size)
                    self._copy(block.pages_offset, block.length)
        except OSError as error:
            raise target_error(error, "cannot make the companion of the snapshot") from error
        started = time.monotonic()
        for block in self._snapshot.blocks.values():
            if block.name in self._mapped and not self.sealed:
                self._mark_stale(block)
        self.stale_seconds = time.monotonic() - started

    def cancel(self) -> None:
        self._channels.cancel()

    def open_for_reading(self) -> int:
        """A descriptor with a position of its own, at the start; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """May be repeated; a QEMU that was given it keeps its own descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """All of ``data``, at ``offset``."""
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], offset + done)

    def _copy_framing(self) -> None:
        """All but bitmaps and pages; the file gets its size."""
        stream = self._snapshot.stream
        os.ftruncate(self.fd, stream.end)
        at = self._snapshot.offset
        for block in stream.blocks:
            self._copy(at, block.header_end - at)
            at = block.pages_end
        self._copy(at, stream.end - at)

    def _copy(self, at: int, length: int) -> None:
        """Bytes of the snapshot to the same place, holes left out."""
        end = at + length
        while at < end:
            at = next_data(self._source, at, end)
            data = os.pread(self._source, min(_WINDOW, end - at), at)
            if at < end and not data:
                raise SnapshotError("the file has become shorter", offset=at)
            self.write_at(at, data)
            at += len(data)

    def _mark_stale(self, block: MappedRamBlock) -> None:
        """Set the bit of each page that is clear in the snapshot and not zero in its file."""
        stored, stale = StoredPages(block.layout, block.bitmap), Bitmap(block.num_pages)
        try:
            pages.find_stale(stored, stale, File(self._source), self._channels)
            found = stale.count()
            if found:
                stale.write_to(self, block.bitmap_offset, everything=False)
            self.stale_pages += found
        finally:
            stale.close()
