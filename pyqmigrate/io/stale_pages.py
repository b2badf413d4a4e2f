"""Find old bytes in a file where it has no page of a block, and remove them.

Every function works through ranges of pages and returns when the last one is done. They raise what
:func:`pyqmigrate.core.error_from_fault` makes of the first failure, and Cancelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyqmigrate.core import Block, Channel, File, Transfer, error_from_fault
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, split_ranges

__all__ = ["StoredPages", "find_stale", "punch_stale", "punch_stale_in_turn"]


class StoredPages(NamedTuple):
    """The pages of a block in a file: their places, and which of them the file contains."""

    layout: BlockLayout
    data: Bitmap


def find_stale(pages: StoredPages, stale: Bitmap, file: File, channels: Channels) -> None:
    """Set in ``stale`` the bits of clear pages that are not zero in the file.

    ``file`` has its own open file description. Only extents of the file are read.
    """
    transfer = _stale_transfer(pages, file, channels)

    def find(channel: Channel, item: Range) -> int:
        return transfer.find_stale(channel, stale, item.first, item.npages)

    channels.run(_ranges(pages), find, "the snapshot", [pages.layout.name])


def punch_stale(pages: StoredPages, file: File, channels: Channels) -> None:
    """Make clear pages that are not zero in the file holes there; ``file`` as for
    :func:`find_stale`."""
    transfer = _stale_transfer(pages, file, channels)

    def punch(channel: Channel, item: Range) -> int:
        return transfer.punch_stale(channel, item.first, item.npages)

    channels.run(_ranges(pages), punch, "the snapshot", [pages.layout.name])


def punch_stale_in_turn(
    pages: StoredPages, file: File, channels: Channels, target: str
) -> Iterator[tuple[Range, int]]:
    """Do the same on this thread; yields each range, and how many of its pages were not zero."""
    transfer = _stale_transfer(pages, file, channels)
    with Channel() as channel:
        for item in _ranges(pages):
            count = transfer.punch_stale(channel, item.first, item.npages)
            if count < 0:
                raise error_from_fault(count, channel.fault, target, pages.layout.name)
            yield item, count


def _stale_transfer(pages: StoredPages, file: File, channels: Channels) -> Transfer:
    return Transfer(channels.core, Block.of(pages.layout), file=file, data=pages.data)


def _ranges(pages: StoredPages) -> Iterable[Range]:
    return split_ranges(0, pages.layout.num_pages, pages.layout.page_size)
