"""Copies of the pages that differ from their digests, in memory of this process.

A save that has written pages while the guest ran copies those that changed since, and lets the guest go
on before it writes the copies::

    with PageCopies(memories, layouts, tables) as copies:
        copies.copy(channels, room)              # while the guest is stopped
        ...
        writer.rewrite_pages(copies.copied, copies.memories)

The guest may run, too: what is entered into the tables are the digests of the copies.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from typing import Self

from pyqmigrate import _core
from pyqmigrate.core import Block, Channel, CopyTarget, Transfer
from pyqmigrate.errors import NotSupported
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, split_ranges
from pyqmigrate.io.mapping import unmap
from pyqmigrate.io.memory import OpenMemory, RamBlock, attach
from pyqmigrate.io.page_digests import DigestTable

__all__ = ["PageCopies"]

_MEMORY = "guest memory"  # in errors
_SAMPLE_PAGES = 64
_SAMPLE_STEP = 64  # a sample is taken of every so many times its pages
_LARGE = 64 << 20  # bytes; smaller blocks are looked at whole
_MAP_NORESERVE = 0x4000


class PageCopies:
    """Copies of pages of blocks, at their offsets; in each list one entry for each block.

    ``copied`` are the bitmaps of the pages copied by the last :meth:`copy`; ``memories`` are the
    copies, zeros elsewhere or what an earlier pass copied there. ``originals`` and ``tables`` are
    borrowed. Raises NotSupported without address space for the copies. Close it.
    """

    def __init__(
        self,
        originals: Sequence[OpenMemory],
        layouts: Sequence[BlockLayout],
        tables: Sequence[DigestTable],
    ) -> None:
        self.copied: list[Bitmap] = []
        self.memories: list[OpenMemory] = []
        self._originals, self._layouts, self._tables = originals, layouts, tables
        self._mappings: list[mmap.mmap] = []
        self._bitmaps = contextlib.ExitStack()
        try:
            for layout in layouts:
                mapping = _map(layout.length)
                self._mappings.append(mapping)
                block = RamBlock(layout.name, mapping, layout.page_size)
                self.memories.append(attach(block, writable=False))
        except BaseException:
            self.close()
            raise

    def copy(self, channels: Channels, room: int) -> bool:
        """Copy the pages that differ from their digests, at most ``room`` bytes.

        Returns whether all were copied; the digests and bits of the others are unchanged. Raises
        GuestMemoryError, Cancelled.
        """
        self._renew_bitmaps()
        left = _core.ffi.new("int64_t *", room)
        with contextlib.ExitStack() as stack:
            targets: list[CopyTarget] = []
            for table, mapping, copied in zip(
                self._tables, self._mappings, self.copied, strict=True
            ):
                targets.append(CopyTarget(table, mapping, copied, left))
                stack.callback(targets[-1].close)
            self._run(channels, targets, self._ranges())
        return int(left[0]) >= 0

    def find_rest(self, channels: Channels) -> list[Bitmap]:
        """Return the pages that differ from their digests, and enter their digests.

        The guest is stopped; the caller closes the bitmaps.
        """
        return self._compare(channels, self._ranges(), update=True)

    def estimate(self, channels: Channels) -> int:
        """Return about how many bytes :meth:`copy` would copy now, from samples of all blocks."""
        changed = self._compare(channels, self._samples(), update=False)
        try:
            return sum(
                bitmap.count() * layout.page_size * _scale(layout)
                for bitmap, layout in zip(changed, self._layouts, strict=True)
            )
        finally:
            for bitmap in changed:
                bitmap.close()

    def _compare(
        self, channels: Channels, ranges: Iterator[Range], *, update: bool
    ) -> list[Bitmap]:
        changed = [Bitmap(table.npages) for table in self._tables]
        blocks = [Block.of(layout) for layout in self._layouts]
        null = _core.ffi.NULL

        def compare(channel: Channel, item: Range) -> int:
            fault = channel.fault.core
            fault.in_memory, fault.at = 1, 0
            rc = _core.lib.qm_compare_pages(
                channels.core.core,
                channel.core,
                blocks[item.block].core,
                self._originals[item.block].core,
                null,
                self._tables[item.block].core,
                update,
                changed[item.block].core,
                item.first,
                item.npages,
                fault,
            )
            return int(rc)

        try:
            channels.run(ranges, compare, _MEMORY, self._names)
        except BaseException:
            for bitmap in changed:
                bitmap.close()
            raise
        return changed

    def _samples(self) -> Iterator[Range]:
        for number, layout in enumerate(self._layouts):
            step = _SAMPLE_PAGES * _scale(layout)
            for first in range(0, layout.num_pages, step):
                yield Range(number, first, min(_SAMPLE_PAGES, layout.num_pages - first))

    @property
    def copied_bytes(self) -> int:
        """The size of the pages that the last :meth:`copy` copied."""
        return sum(
            bitmap.count() * layout.page_size
            for bitmap, layout in zip(self.copied, self._layouts, strict=True)
        )

    @property
    def _names(self) -> list[str]:
        return [layout.name for layout in self._layouts]

    def _ranges(self) -> Iterator[Range]:
        for number, layout in enumerate(self._layouts):
            yield from split_ranges(number, layout.num_pages, layout.page_size)

    def _run(
        self, channels: Channels, targets: Sequence[CopyTarget], ranges: Iterator[Range]
    ) -> None:
        transfers = [
            Transfer(channels.core, Block.of(layout), memory=memory)
            for layout, memory in zip(self._layouts, self._originals, strict=True)
        ]

        def copy(channel: Channel, item: Range) -> int:
            target = targets[item.block]
            return transfers[item.block].copy_changed(channel, target, item.first, item.npages)

        channels.run(ranges, copy, _MEMORY, self._names)

    def _renew_bitmaps(self) -> None:
        self._bitmaps.close()
        self.copied = [Bitmap(layout.num_pages) for layout in self._layouts]
        for bitmap in self.copied:
            self._bitmaps.callback(bitmap.close)

    def close(self) -> None:
        """Release the memory. Idempotent."""
        self._bitmaps.close()
        for memory in self.memories:
            memory.close()
        for mapping in self._mappings:
            unmap(mapping)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _scale(layout: BlockLayout) -> int:
    return 1 if layout.length < _LARGE else _SAMPLE_STEP


def _map(length: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        mapping = mmap.mmap(-1, length, flags=flags)
    except (OSError, OverflowError) as error:
        raise NotSupported(f"there is no address space for {length} bytes ({error})") from error
    # A huge page would take 2 MiB where one page changed; a child would share what is copied.
    for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_DONTFORK):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(advice)
    return mapping
