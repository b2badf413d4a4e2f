"""Stale pages: old bytes in the file under clear bits, where the guest's page is zero.

A live save leaves them behind, and so does a save over an older file. Loads ignore them, but a guest
whose memory is a mapping of the file would see them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from pyqmigrate import _core
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, core_block, split_ranges
from pyqmigrate.io.direct_io import core_file

if TYPE_CHECKING:
    from pyqmigrate.snapshot.mapped_ram import MappedRamBlock, MappedRamSnapshot

__all__ = ["clear_stale", "find_stale"]


def find_stale(snapshot: MappedRamSnapshot, channels: Channels) -> dict[str, int]:
    """How many stale pages each block has; blocks without any are left out.

    Only what the file holds under clear bits is read. Raises SnapshotError for bad bitmaps,
    TargetError, Cancelled.
    """
    file, found = core_file(snapshot.source.fd, None), {}
    for block in snapshot.blocks.values():
        if block.external:
            continue
        stale = Bitmap(block.num_pages)
        try:
            _each(block, channels, _core.lib.qm_find_stale, file, stale.core)
            if count := stale.count():
                found[block.name] = count
        finally:
            stale.close()
    return found


def clear_stale(
    snapshot: MappedRamSnapshot, fd: int, names: Collection[str], channels: Channels
) -> None:
    """Make them holes in the blocks ``names``; ``fd`` is the file, open for writing, our own."""
    file = core_file(fd, None)
    for name in names:
        _each(snapshot.blocks[name], channels, _core.lib.qm_stale_punch, file)


def _each(block: MappedRamBlock, channels: Channels, function: Any, file: Any, *more: Any) -> None:
    """Call a function of the core for all of a block, range by range."""
    layout, bits = core_block(block.layout), block.bitmap

    def move(channel: Any, piece: Range, fault: Any) -> int:
        count = function(
            channels.core, channel, file, layout, bits.core, *more, piece.first, piece.npages, fault
        )
        return min(int(count), 0)

    pieces = split_ranges(0, block.num_pages, block.page_size)
    channels.run(pieces, move, "the snapshot", [block.name])
