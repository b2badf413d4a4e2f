"""Stale pages: old bytes in the file under clear bits, where the guest's page is zero.

A live save leaves them behind, and so does a save over an older file. Loads ignore them, but a guest
whose memory is a mapping of the file would see them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pyqmigrate import _core
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, core_block, split_ranges
from pyqmigrate.io.direct_io import core_file
from pyqmigrate.snapshot.base import Block, Snapshot

__all__ = ["clear_stale", "find_stale"]


def find_stale(snapshot: Snapshot, channels: Channels) -> dict[str, int]:
    """Return how many stale pages each block has, for blocks that have any.

    Only extents of the file under clear bits are read; a stream without bitmaps has no stale pages.
    Raises SnapshotError for bad bitmaps, TargetError, Cancelled.
    """
    file, found = core_file(snapshot.source.fd, None), {}
    for block in snapshot.blocks.values():
        if block.layout is None or block.external:
            continue
        stale = Bitmap(block.num_pages)
        try:
            _each(block, channels, _core.lib.qm_find_stale, file, stale.core)
            if count := stale.count():
                found[block.name] = count
        finally:
            stale.close()
    return found


def clear_stale(snapshot: Snapshot, fd: int, names: Collection[str], channels: Channels) -> None:
    """Make the stale pages of the blocks ``names`` holes. ``fd`` is the file, open for writing, with
    its own open file description."""
    file = core_file(fd, None)
    for name in names:
        _each(snapshot.blocks[name], channels, _core.lib.qm_stale_punch, file)


def _each(block: Block, channels: Channels, function: Any, file: Any, *more: Any) -> None:
    """Call a function of the core for a whole block, range by range."""
    bits = block.bitmap
    assert block.layout is not None and bits is not None  # the caller has checked
    layout = core_block(block.layout)

    def move(channel: Any, piece: Range, fault: Any) -> int:
        count = function(
            channels.core, channel, file, layout, bits.core, *more, piece.first, piece.npages, fault
        )
        return min(int(count), 0)

    pieces = split_ranges(0, block.num_pages, block.page_size)
    channels.run(pieces, move, "the snapshot", [block.name])
