"""Write guest memory to a mapped-ram snapshot.

The order of writes is what makes a partial file recognisable: head with its magic still zero,
pages, bitmaps, tail, fsync, magic.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from pyqmigrate import _core
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.format.stream.writer import Head, encode_head, encode_tail
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, core_block, failure, split_ranges
from pyqmigrate.io.direct_io import DirectIO, core_file
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.target import Target, stream_offset
from pyqmigrate.snapshot.save.writer import SaveReport, Sparse, StreamWriter, WriteObserver

__all__ = ["Writer"]


class Writer(StreamWriter):
    """A mapped-ram snapshot being written. With ``mark_zero`` (and DENSE) zero pages count as data:
    they are written and their bits are set. ``before`` are elements, as they are, that stand before
    RAM's.

    An ``observer`` hears what is written, and the last word before publication is its.
    """

    def __init__(
        self,
        target: Target,
        blocks: Sequence[RamBlock],
        *,
        direct_io: DirectIO,
        sparse: Sparse,
        mark_zero: bool = False,
        channels: int,
        machine: str = "",
        target_page_bits: int | None = None,
        uuid: bytes | None = None,
        left_out: Collection[str] | None = None,
        before: bytes = b"",
        reuse: bool = False,
        max_bandwidth: int = 0,
        observer: WriteObserver | None = None,
        prefix: bytes = b"",
    ) -> None:
        super().__init__(
            blocks,
            channels=channels,
            reuse=reuse,
            max_bandwidth=max_bandwidth,
            prefix=prefix,
            left_out=left_out,
        )
        self.observer = observer
        # Whether pages whose bit is clear can have old bytes in the file.
        self._stale = reuse
        self._passes = 0
        self.sparse = sparse
        self.policy = sparse.core()
        self.policy.mark_zero = mark_zero
        with self._closed_on_error():
            self.head: Head = encode_head(
                machine,
                self.specs,
                offset=stream_offset(target) + len(prefix),
                target_page_bits=target_page_bits,
                uuid=uuid,
                left_out=left_out,
                before=before,
            )
            self.settings = self.head.configuration
            self.bitmaps = [Bitmap(layout.num_pages) for layout in self.head.blocks]
            for bitmap in self.bitmaps:
                self._cleanup.callback(bitmap.close)
            self._open(target, direct_io)

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

    def write_pages(self, selections: Sequence[Bitmap] | None = None) -> None:
        """One pass over all blocks, or over the pages that ``selections`` has of each."""
        file = core_file(self.target.fd, self.target.direct)
        if self.observer is not None and not self.reuse:
            self.observer.watch(file)
        self._passes += 1
        self._stale |= self._passes > 1
        self._pass(self.channels, file, self.bitmaps, selections)

    def clean(self) -> int:
        """Make every page whose bit is clear read as zeros in the file: earlier passes, or an
        earlier snapshot, may have left bytes there. Returns how many pages had some."""
        found = 0
        fault = _core.ffi.new("struct qm_fault *")
        channel = _core.ffi.gc(_core.lib.qm_channel_create(), _core.lib.qm_channel_destroy)
        with self.target.opened_for_reading() as fd:
            file = core_file(fd, None)
            for bitmap, layout in self._stored_parts():
                for item in split_ranges(0, layout.num_pages, layout.page_size):
                    count = _core.lib.qm_stale_punch(
                        self.channels.core,
                        channel,
                        file,
                        core_block(layout),
                        bitmap.core,
                        item.first,
                        item.npages,
                        fault,
                    )
                    if count < 0:
                        raise failure(count, fault, self.target.name, layout.name)
                    if count and self.observer is not None:
                        at = layout.pages_offset + item.first * layout.page_size
                        self.observer.forget(at, item.npages * layout.page_size)
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
        """Write bitmaps and tail (device ``sections`` verbatim), then publish."""
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
            self.clean()  # what it reports is of a file without old bytes
        for bitmap, layout in self._stored_parts():
            bitmap.write_to(self, layout.bitmap_offset, everything=self.reuse)
        at = self.head.tail_offset
        for piece in tail:
            self.write_at(at, piece)
            at += len(piece)
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
        """Write through the buffered descriptor, and count it."""
        self.target.write_at(offset, data)
        if self.observer is not None:
            self.observer.forget(offset, len(data))
        _core.lib.qm_job_count_io(self.channels.core, len(data), 0)

    def _needed(self) -> int:
        dense = self.sparse is Sparse.DENSE
        stored = (self.memories[n] for n in self.stored)
        return sum(memory.length if dense else memory.extent_bytes for memory in stored)

    def _stored_parts(self) -> list[tuple[Bitmap, BlockLayout]]:
        """Bitmap and place of each block whose content is written."""
        return [(self.bitmaps[n], self.head.blocks[n]) for n in self.stored]

    def _count(self) -> int:
        if self.sparse is Sparse.DENSE:
            return self.total
        layouts = self.head.blocks
        bitmaps = [Bitmap(layout.num_pages) for layout in layouts]
        counter = self.channels.sibling("pyqmigrate-count")
        try:
            self._pass(counter, core_file(-1, None), bitmaps, None)
            return sum(
                bitmap.count() * layout.page_size
                for bitmap, layout in zip(bitmaps, layouts, strict=True)
            )
        finally:
            for bitmap in bitmaps:
                bitmap.close()

    def _pass(
        self,
        channels: Channels,
        file: Any,
        bitmaps: Sequence[Bitmap],
        selections: Sequence[Bitmap] | None,
    ) -> None:
        layouts = self.head.blocks
        names = [layout.name for layout in layouts]
        # What every call on a block gets, whichever its range.
        common = [
            (
                file,
                core_block(layout),
                memory.core,
                self.policy,
                selections[n].core if selections else _core.ffi.NULL,
                bitmaps[n].core,
            )
            for n, (layout, memory) in enumerate(zip(layouts, self.memories, strict=True))
        ]

        def move(channel: Any, item: Range, fault: Any) -> int:
            return _core.lib.qm_write(
                channels.core, channel, *common[item.block], item.first, item.npages, fault
            )

        channels.run(
            (
                item
                for n in self.stored
                for item in split_ranges(n, layouts[n].num_pages, layouts[n].page_size)
            ),
            move,
            self.target.name,
            names,
        )
        # Every direct write has returned: now what shares a file block with none of them.
        fault = _core.ffi.new("struct qm_fault *")
        channel = _core.ffi.gc(_core.lib.qm_channel_create(), _core.lib.qm_channel_destroy)
        for n in self.stored:
            rc = _core.lib.qm_write_tail(channels.core, channel, *common[n], fault)
            if rc:
                raise failure(rc, fault, self.target.name, names[n])
