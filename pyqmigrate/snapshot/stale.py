"""Stale pages: old bytes in the file under clear bits, where the guest's page is zero.

A live save leaves them behind, and so does a save over an older file. Loads ignore them, but a guest
whose memory is a mapping of the file would see them.
"""

from __future__ import annotations

from collections.abc import Collection

from pyqmigrate.core import File
from pyqmigrate.io import stale_pages
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.stale_pages import StoredPages
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["clear_stale", "find_stale"]


def find_stale(snapshot: Snapshot, channels: Channels) -> dict[str, int]:
    """Return how many stale pages each block has, for blocks that have any.

    Only extents of the file under clear bits are read; a stream without bitmaps has no stale pages.
    Raises SnapshotError for bad bitmaps, TargetError, Cancelled.
    """
    file, found = File(snapshot.source.fd), {}
    for block in snapshot.blocks.values():
        bits = None if block.external else block.bitmap
        if block.layout is None or bits is None:
            continue
        stale = Bitmap(block.num_pages)
        try:
            stale_pages.find_stale(StoredPages(block.layout, bits), stale, file, channels)
            if count := stale.count():
                found[block.name] = count
        finally:
            stale.close()
    return found


def clear_stale(snapshot: Snapshot, fd: int, names: Collection[str], channels: Channels) -> None:
    """Make the stale pages of the blocks ``names`` holes. ``fd`` is the file, open for writing, with
    its own open file description."""
    file = File(fd)
    for name in names:
        block = snapshot.blocks[name]
        bits = block.bitmap
        assert block.layout is not None and bits is not None  # the caller has checked
        stale_pages.punch_stale(StoredPages(block.layout, bits), file, channels)
