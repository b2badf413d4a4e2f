"""Write guest memory to a mapped-ram snapshot.

The order of writes makes a partial file recognisable: the head with a zero magic, pages, bitmaps,
tail, fsync, magic.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pyqmigrate.core import File, Policy
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.format.stream.writer import Head, encode_head, encode_tail
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Range
from pyqmigrate.io.direct_io import Direct
from pyqmigrate.io.memory import OpenMemory, RamBlock
from pyqmigrate.io.pages import BlockPages, count_pages, write_pages
from pyqmigrate.io.stale_pages import StoredPages, punch_stale_in_turn
from pyqmigrate.io.target import Target, stream_offset
from pyqmigrate.snapshot.save.writer import (
    SaveOptions,
    SaveReport,
    Sparse,
    StreamWriter,
    WriteObserver,
)

if TYPE_CHECKING:
    from pyqmigrate.io.page_digests import DigestTable

__all__ = ["Writer"]


class Writer(StreamWriter):
    """A mapped-ram snapshot being written. ``observer`` is called for everything that is written,
    and last before publication."""

    def __init__(
        self,
        target: Target,
        blocks: Sequence[RamBlock],
        options: SaveOptions,
        observer: WriteObserver | None = None,
    ) -> None:
        super().__init__(blocks, options, channels=options.channels)
        self.observer = observer
        self._stale = options.reuse  # whether clear pages may have old bytes in the file
        self._passes = 0
        self.sparse = options.sparse
        self._mark_zero = options.mark_zero
        self.policy = options.sparse.policy(mark_zero=options.mark_zero)
        with self._closed_on_error():
            self.head: Head = encode_head(
                options.machine,
                self.specs,
                offset=_stream_starts(target, options),
                target_page_bits=options.target_page_bits,
                uuid=options.uuid,
                left_out=options.left_out,
                before=options.before,
            )
            self.settings = self.head.configuration
            self.bitmaps = [Bitmap(layout.num_pages) for layout in self.head.blocks]
            for bitmap in self.bitmaps:
                self._cleanup.callback(bitmap.close)
            self._open(target, options.direct_io)

    def begin(self) -> None:
        """Check the space, give the file its size and write the head, without its magic."""
        self._check_space()
        self.target.set_size(self.head.tail_offset)
        if self.observer is not None:
            self.observer.resize(self.head.tail_offset)
        for piece in self.head.pieces:
            data = piece.data
            if piece.offset == self.target.offset:
                data = bytes(len(MAGIC)) + data[len(MAGIC) :]
            self.write_at(piece.offset, data)

    def write_pages(
        self,
        selections: Sequence[Bitmap | None] | None = None,
        *,
        tables: Sequence[DigestTable] | None = None,
    ) -> None:
        """Write all pages, or the pages selected by one bitmap per block, in one pass.

        ``tables``, one for each block, get the digests of all pages as they are written; a file that
        is reused has no place for them.
        """
        file = self._file(self.target.direct)
        if tables is not None:
            assert selections is None and not self.reuse
            for table, layout in zip(tables, self.head.blocks, strict=True):
                table.enter_zeros(layout.page_size)
            file.digest_pages(list(zip(self.head.blocks, tables, strict=True)))
        self._passes += 1
        self._stale |= self._passes > 1
        self._write(
            self._stored(self.bitmaps, selections), file, self.policy, self._ranges(selections)
        )

    def rewrite_pages(
        self, selections: Sequence[Bitmap], copies: Sequence[OpenMemory] | None = None
    ) -> None:
        """Write the selected pages again, zero pages too: no old bytes remain.

        With ``Sparse.EXACT`` zero pages are not written; :meth:`clean` has to follow. ``copies``, one
        for each block, have the selected pages at their offsets, and nothing else is written
        from them.
        """
        exact = self.sparse is Sparse.EXACT
        self._passes += 1
        self._stale |= exact
        blocks = self._stored(self.bitmaps, selections)
        direct = self.target.direct
        if copies is not None:
            blocks = [
                replace(block, memory=copies[number])
                for number, block in zip(self.stored, blocks, strict=True)
            ]
            if direct is not None and any(
                layout.page_size % direct.off_align for layout in self.head.blocks
            ):
                direct = None  # writes would be extended to pages that were not copied
        # No gaps: a gap is not in the copies.
        policy = Policy(everything=not exact, mark_zero=self._mark_zero and not exact)
        self._write(blocks, self._file(direct), policy)

    def _file(self, direct: Direct | None) -> File:
        file = File(self.target.fd, direct)
        if self.observer is not None and not self.reuse:
            self.observer.watch(file)
        return file

    def _write(
        self,
        blocks: Sequence[BlockPages],
        file: File,
        policy: Policy,
        ranges: Iterator[Range] | None = None,
    ) -> None:
        write_pages(blocks, file, policy, self.channels, self.target.name, ranges)

    def _ranges(self, selections: Sequence[Bitmap | None] | None) -> Iterator[Range] | None:
        """Return the ranges that a pass looks at; None: all."""
        return None

    def clean(self) -> int:
        """Make clear pages zeros in the file, where earlier passes or an earlier snapshot left bytes.
        Returns how many pages had some."""
        found = 0
        with self.target.opened_for_reading() as fd:
            file = File(fd)
            for pages in self._stored(self.bitmaps):
                layout = pages.layout
                stored = StoredPages(layout, pages.data)
                for item, count in punch_stale_in_turn(
                    stored, file, self.channels, self.target.name
                ):
                    if count and self.observer is not None:
                        offset = layout.pages_offset + item.first * layout.page_size
                        self.observer.forget(offset, item.npages * layout.page_size)
                    found += count
        self._stale = False
        return found

    def finish(
        self,
        sections: bytes = b"",
        description: bytes | None = None,
        *,
        switchover_start: bool = False,
    ) -> SaveReport:
        """Write bitmaps and tail, with device ``sections`` verbatim, then publish."""
        return self.finish_with(
            [
                encode_tail(
                    settings=self.settings,
                    sections=sections,
                    description=description,
                    switchover_start=switchover_start,
                    page_size=self.head.blocks[0].page_size,
                )
            ]
        )

    def finish_with(self, tail: Iterable[bytes]) -> SaveReport:
        if self.observer is not None and self._stale:
            self.clean()  # the observer's record is of a file without old bytes
        for pages in self._stored(self.bitmaps):
            pages.data.write_to(self, pages.layout.bitmap_offset, everything=self.reuse)
        offset = self.head.tail_offset
        for piece in tail:
            self.write_at(offset, piece)
            offset += len(piece)
        self._publish()
        if self.observer is not None:
            self.observer.published(self.head, os.fstat(self.target.fd).st_mtime_ns)
        return self._report()

    def _before_publication(self) -> None:
        super()._before_publication()
        if self.observer is None:
            return
        with self.target.opened_for_reading() as fd:
            self.observer.finish(fd, self.target.name, self.channels.sibling("pyqmigrate-observer"))

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write through the buffered descriptor, and count the bytes."""
        self.target.write_at(offset, data)
        if self.observer is not None:
            self.observer.forget(offset, len(data))
        self.channels.core.count_io(len(data))

    def _needed(self) -> int:
        dense = self.sparse is Sparse.DENSE
        stored = (self.memories[n] for n in self.stored)
        return sum(memory.length if dense else memory.extent_bytes for memory in stored)

    def _stored(
        self, bitmaps: Sequence[Bitmap], selections: Sequence[Bitmap | None] | None = None
    ) -> list[BlockPages]:
        """Return the pages of each block whose content is written."""
        return [
            BlockPages(
                self.head.blocks[number],
                bitmaps[number],
                self.memories[number],
                selections[number] if selections else None,
            )
            for number in self.stored
        ]

    def _count(self) -> int:
        if self.sparse is Sparse.DENSE:
            return self.total
        bitmaps = [Bitmap(layout.num_pages) for layout in self.head.blocks]
        try:
            blocks = self._stored(bitmaps)
            count_pages(blocks, self.channels.sibling("pyqmigrate-count"), self.target.name)
            return sum(block.data.count() * block.layout.page_size for block in blocks)
        finally:
            for bitmap in bitmaps:
                bitmap.close()


def _stream_starts(target: Target, options: SaveOptions) -> int:
    if options.stream_offset is not None:
        return options.stream_offset
    return stream_offset(target) + len(options.prefix)
