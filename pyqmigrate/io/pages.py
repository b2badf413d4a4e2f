"""The loop that moves the pages of blocks: write, count and read.

Every function works through ranges of pages with all channels, and returns when the last one is
done. They raise what :func:`pyqmigrate.core.error_from_fault` makes of the first failure, and
Cancelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pyqmigrate.core import Block, Channel, File, Policy, Transfer, error_from_fault
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, split_ranges
from pyqmigrate.io.memory import OpenMemory

__all__ = ["BlockPages", "count_pages", "ranges_of", "read_pages", "write_pages"]


@dataclass(frozen=True)
class BlockPages:
    """The pages of a block: their places in a file, which of them the file contains, and the memory that they are
    copied from or to. ``selection``: the pages that belong to this pass, None for all."""

    layout: BlockLayout
    data: Bitmap
    memory: OpenMemory
    selection: Bitmap | None = None


def ranges_of(blocks: Sequence[BlockPages]) -> Iterator[Range]:
    """Return the ranges of all pages, block by block."""
    for number, block in enumerate(blocks):
        yield from split_ranges(number, block.layout.num_pages, block.layout.page_size)


def write_pages(
    blocks: Sequence[BlockPages],
    file: File,
    policy: Policy,
    channels: Channels,
    target: str,
    ranges: Iterable[Range] | None = None,
) -> None:
    """Write the selected pages, by the policy, and update ``data`` of each block.

    ``target`` names the file in errors. ``ranges``: only in these pages.
    """
    transfers = _transfers(blocks, file, policy, channels)
    _write_ranges(
        blocks, transfers, ranges_of(blocks) if ranges is None else ranges, channels, target
    )
    # All direct writes have returned: now the pages that share a file block with one of them.
    with Channel() as channel:
        for block, transfer in zip(blocks, transfers, strict=True):
            rc = transfer.write_tail(channel)
            if rc:
                raise error_from_fault(rc, channel.fault, target, block.layout.name)


def count_pages(
    blocks: Sequence[BlockPages],
    channels: Channels,
    target: str,
    ranges: Iterable[Range] | None = None,
) -> None:
    """Set the bits of the pages that are not zero now. ``ranges``: only in these pages."""
    transfers = _transfers(blocks, File(), Policy(), channels)
    _write_ranges(
        blocks, transfers, ranges_of(blocks) if ranges is None else ranges, channels, target
    )


def _write_ranges(
    blocks: Sequence[BlockPages],
    transfers: Sequence[Transfer],
    ranges: Iterable[Range],
    channels: Channels,
    target: str,
) -> None:
    def write(channel: Channel, item: Range) -> int:
        return transfers[item.block].write(channel, item.first, item.npages)

    channels.run(ranges, write, target, [block.layout.name for block in blocks])


def read_pages(
    blocks: Sequence[BlockPages],
    file: File,
    policy: Policy,
    channels: Channels,
    source: str,
    ranges: Iterable[Range],
) -> None:
    """Read the pages that the file contains into memory; ``source`` names the file in errors."""
    transfers = _transfers(blocks, file, policy, channels)

    def read(channel: Channel, item: Range) -> int:
        return transfers[item.block].read(channel, item.first, item.npages)

    channels.run(ranges, read, source, [block.layout.name for block in blocks])


def _transfers(
    blocks: Sequence[BlockPages], file: File, policy: Policy, channels: Channels
) -> list[Transfer]:
    return [
        Transfer(
            channels.core,
            Block.of(block.layout),
            file=file,
            memory=block.memory,
            policy=policy,
            data=block.data,
            selection=block.selection,
        )
        for block in blocks
    ]
