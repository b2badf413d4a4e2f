"""The small stream for a QEMU whose RAM is already mapped from the snapshot.

It is the snapshot's own stream, at the same offsets, but with clear bitmaps for the mapped blocks:
QEMU then does not load their pages. Framing, device state and the other blocks are copied. It is a
memfd that consists mostly of holes.

A page whose bit is clear in the snapshot is zero for the guest, but the file may contain old bytes
there (a live save leaves them). Such stale pages are found by reading the file under clear bits.
Here their bits are set over a hole, so that QEMU reads zeros into its private copy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection

from pyqmigrate.core import File
from pyqmigrate.errors import SnapshotError, target_error
from pyqmigrate.io import stale_pages
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.holes import next_data
from pyqmigrate.io.stale_pages import StoredPages
from pyqmigrate.snapshot.mapped_ram import MappedRamBlock, MappedRamSnapshot

__all__ = ["IncomingStream"]

_WINDOW = 1 << 20  # bytes copied at a time


class IncomingStream:
    """The stream for a QEMU that maps the blocks ``mapped`` of ``snapshot``. Close it.

    ``snapshot_fd`` is the snapshot's file, open for reading; its position is moved. After
    :meth:`build`, ``stale_pages`` is the number of marked pages; finding them took
    ``stale_seconds``. ``sealed``: a seal guarantees that there are none, so the file is not scanned.
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
        self.fd = os.memfd_create("incoming-stream", os.MFD_CLOEXEC)

    def build(self) -> None:
        """Write the stream. Blocks; :meth:`cancel` from another thread ends it with Cancelled.

        Raises SnapshotError for bad bitmaps, TargetError if a file cannot be read or written.
        """
        try:
            self._copy_stream()
        except OSError as error:
            raise target_error(error, "cannot write the incoming stream") from error
        started = time.monotonic()
        for block in self._snapshot.blocks.values():
            if block.name in self._mapped and not self.sealed:
                self._mark_stale(block)
        self.stale_seconds = time.monotonic() - started

    def _copy_stream(self) -> None:
        """Copy everything but the bitmaps and pages of the mapped blocks."""
        self._copy_framing()
        for block in self._snapshot.blocks.values():
            if block.name not in self._mapped:
                self._copy(block.bitmap_offset, block.layout.bitmap_size)
                self._copy(block.pages_offset, block.length)

    def cancel(self) -> None:
        self._channels.cancel()

    def open_for_reading(self) -> int:
        """Return a descriptor with its own position, at the start; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Can be called again; QEMU keeps a descriptor of its own."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of ``data`` at ``offset``."""
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], offset + done)

    def _copy_framing(self) -> None:
        """Copy everything but bitmaps and pages; set the size of the file."""
        stream = self._snapshot.stream
        os.ftruncate(self.fd, stream.end)
        offset = self._snapshot.offset
        for block in stream.blocks:
            self._copy(offset, block.header_end - offset)
            offset = block.pages_end
        self._copy(offset, stream.end - offset)

    def _copy(self, offset: int, length: int) -> None:
        """Copy bytes of the snapshot to the same offset, except holes."""
        end = offset + length
        while offset < end:
            offset = next_data(self._source, offset, end)
            data = os.pread(self._source, min(_WINDOW, end - offset), offset)
            if offset < end and not data:
                raise SnapshotError("the file has become shorter", offset=offset)
            self.write_at(offset, data)
            offset += len(data)

    def _mark_stale(self, block: MappedRamBlock) -> None:
        """Set the bit of each page that is clear in the snapshot but not zero in its file."""
        stored, stale = StoredPages(block.layout, block.bitmap), Bitmap(block.num_pages)
        try:
            stale_pages.find_stale(stored, stale, File(self._source), self._channels)
            count = stale.count()
            if count:
                stale.write_to(self, block.bitmap_offset, everything=False)
            self.stale_pages += count
        finally:
            stale.close()
