"""The seal of a snapshot that is being written: digests of the bytes as the kernel gets them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.format.stream.writer import Head
from pyqmigrate.integrity.digests import Digests
from pyqmigrate.integrity.manifest import Manifest, write_manifest
from pyqmigrate.io.channels import Channels

__all__ = ["SaveSeal"]


class SaveSeal(Digests):
    """An observer of a writer (:class:`pyqmigrate.snapshot.save.writer.WriteObserver`).

    ``offset`` is where the stream starts in the file, and ``first`` are the file's first bytes if
    they, too, are written last (an increment's, by descriptors). With ``place`` the seal is written there when
    the snapshot has its name; without, :meth:`manifest` makes it later.
    """

    def __init__(
        self, algorithm: Algorithm, offset: int, place: Path | None = None, *, first: bytes = b""
    ) -> None:
        super().__init__(algorithm, overlay=[(offset, MAGIC), (0, first)])
        self._place = place
        self._head: Head | None = None

    def finish(self, fd: int, name: str, channels: Channels) -> None:
        """Read what was not observed as it was written."""
        self.resize(os.fstat(fd).st_size)
        self.read_rest(fd, name, channels)

    def published(self, head: Head, mtime_ns: int) -> None:
        """Write the seal, if its place is known."""
        self._head = head
        if self._place is not None:
            write_manifest(self._place, self.manifest(mtime_ns))

    def manifest(self, mtime_ns: int) -> Manifest:
        """Return the seal of a published file, whose time of last change is ``mtime_ns``."""
        if self._head is None:
            raise ValueError("the file has not been published")
        return self.seal(
            mtime_ns,
            self._head.pieces[0].offset,
            self._head.blocks,
            clear_pages_zero=True,
            bitmap_order=sys.byteorder,
        )
