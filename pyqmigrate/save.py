"""One pass out: guest memory -> a mapped-ram snapshot.

The order of writes is what makes a partial file recognisable: head with its magic still zero,
pages, bitmaps, tail, fsync, magic.
"""

from __future__ import annotations

import contextlib
import enum
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyqmigrate import _core
from pyqmigrate.errors import Cancelled, NoSpace, UsageError
from pyqmigrate.format.mapped_ram import BlockSpec
from pyqmigrate.format.stream import MAGIC, Head, encode_head, encode_tail
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import (
    Channels,
    Job,
    Progress,
    Range,
    check_channels,
    core_block,
    cut,
    failure,
)
from pyqmigrate.io.memory import Attached, RamBlock, attach
from pyqmigrate.io.target import DirectIO, OutputTarget, Target, core_file, stream_offset
from pyqmigrate.log import logger
from pyqmigrate.options import choice

__all__ = ["SaveReport", "Sparse", "save", "start_save"]


class Sparse(enum.StrEnum):
    """What becomes of zero pages. Their bits are clear in every case.

    ``auto``: short gaps between data are written along, where that saves calls; at most half as
    much again as the data, in every 4 MiB. ``exact``: a zero page is never allocated.
    ``dense``: everything is written.
    """

    AUTO = "auto"
    EXACT = "exact"
    DENSE = "dense"

    def core(self) -> Any:
        """The policy as the core's ``struct qm_sparse *``."""
        gap, share = _GAPS[self]
        policy = _core.ffi.new("struct qm_sparse *")
        policy.max_gap = gap
        policy.gap_share = share
        policy.everything = self is Sparse.DENSE
        return policy


# Longest gap in bytes, and the gaps' share of the data in percent.
_GAPS = {Sparse.AUTO: (32 << 10, 50), Sparse.EXACT: (0, 0), Sparse.DENSE: (0, 0)}


@dataclass(frozen=True)
class SaveReport:
    """What a save did.

    ``bytes_written`` counts all descriptors; ``bytes_allocated`` is what the file holds on disk;
    ``seconds`` is wall time up to and with the last fsync. ``direct_io`` says whether pages went
    past the page cache, ``direct_io_reason`` why. ``unaligned_blocks`` names those whose memory
    had to be copied for direct I/O.
    """

    data_pages: int
    zero_pages: int
    bytes_written: int
    bytes_allocated: int
    file_size: int
    seconds: float
    direct_io: bool
    direct_io_reason: str
    channels: int
    sparse: Sparse
    unaligned_blocks: tuple[str, ...]


def save(
    target: Target,
    blocks: Sequence[RamBlock],
    *,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    sparse: Sparse | str = Sparse.AUTO,
    machine: str = "",
    target_page_bits: int | None = None,
    reuse: bool = False,
    max_bandwidth: int = 0,
    progress: Callable[[Progress], object] | None = None,
) -> SaveReport:
    """Save guest memory to a snapshot and wait until it is durable.

    Like :func:`start_save`, with ``progress`` called on this thread at most ten times a second.
    When the wait is interrupted, or ``progress`` raises, the save is cancelled and leaves nothing.
    """
    return start_save(
        target, blocks, channels=channels, direct_io=direct_io, sparse=sparse, machine=machine,
        target_page_bits=target_page_bits, reuse=reuse, max_bandwidth=max_bandwidth,
    ).wait(progress)


def start_save(
    target: Target,
    blocks: Sequence[RamBlock],
    *,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    sparse: Sparse | str = Sparse.AUTO,
    machine: str = "",
    target_page_bits: int | None = None,
    reuse: bool = False,
    max_bandwidth: int = 0,
) -> Job[SaveReport]:
    """Begin to save guest memory; returns at once.

    target: a path, a ``file:PATH[,offset=SIZE]`` URI, or Descriptors. A path without an offset
        gets its name only when the snapshot is whole and durable.
    blocks: the RAM blocks, in the order in which the file lists them. The memory must not change
        until the job has ended.
    channels: threads that move pages, 1 to 255.
    machine: the machine type; an empty one loads on any machine.
    target_page_bits: for targets that expect it (ARM with 4 KiB pages: 12).
    reuse: overwrite the target in place, so that its allocated blocks are written again, which
        is about twice as fast; what it held is lost from the start. Zero pages then may hold old
        bytes under their clear bits.
    max_bandwidth: bytes a second over all channels; 0 is no limit.

    Raises UsageError for bad arguments, TargetError (NoSpace, DirectIORefused) when the system
    refuses; the job's result raises these too, GuestMemoryError when memory went away, Cancelled.
    """
    writer = Writer(
        target, blocks,
        direct_io=choice(DirectIO, direct_io, "direct_io"),
        sparse=choice(Sparse, sparse, "sparse"),
        channels=check_channels(channels), machine=machine, target_page_bits=target_page_bits,
        reuse=reuse, max_bandwidth=max_bandwidth,
    )
    try:
        return Job(writer.channels, writer.total, writer.run)
    except BaseException:
        writer.close()
        raise


class Writer:
    """A snapshot being written: ``begin``, passes over memory, ``finish``.

    It owns what it opens from its construction on; :meth:`close` lets go of everything, and drops
    a file that was not finished. ``run`` is the whole of a save with one pass. With ``mark_zero``
    (and DENSE) zero pages count as data: they are written and their bits are set.
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
        ignore_shared: bool = False,
        reuse: bool = False,
        max_bandwidth: int = 0,
    ) -> None:
        if not blocks:
            raise UsageError("no RAM blocks are given; a snapshot has at least one")
        self.started = time.monotonic()
        self.sparse = sparse
        self.policy = sparse.core()
        self.policy.mark_zero = mark_zero
        self.reuse = reuse
        self.channels = Channels(channels, "pyqmigrate-save")
        self.channels.set_rate(max_bandwidth)
        with contextlib.ExitStack() as stack:
            self.memories: list[Attached] = []
            for block in blocks:
                memory = attach(block, writable=False)
                stack.callback(memory.close)
                self.memories.append(memory)
            self.head: Head = encode_head(
                machine,
                [BlockSpec(b.name, m.length, b.page_size)
                 for b, m in zip(blocks, self.memories, strict=True)],
                offset=stream_offset(target), target_page_bits=target_page_bits, uuid=uuid,
                ignore_shared=ignore_shared,
            )
            self.bitmaps = [Bitmap(layout.num_pages) for layout in self.head.blocks]
            for bitmap in self.bitmaps:
                stack.callback(bitmap.close)
            sources = {m.identity for m in self.memories if m.identity is not None}
            self.target = OutputTarget.open(target, direct_io, reuse=reuse, sources=sources)
            stack.callback(self.target.abort)
            self._cleanup = stack.pop_all()

    @property
    def total(self) -> int:
        """Bytes of guest memory."""
        return sum(memory.length for memory in self.memories)

    def close(self) -> None:
        """May be repeated."""
        self._cleanup.close()

    def run(
        self, sections: bytes = b"", description: bytes | None = None, *,
        switchover_start: bool = False,
    ) -> SaveReport:
        """Save in one pass, make the file a snapshot, and close; arguments as in finish."""
        with self._cleanup:
            self.begin()
            self.write_pages()
            return self.finish(sections, description, switchover_start=switchover_start)

    def begin(self) -> None:
        """Check the space, give the file its size and write the head, without its magic."""
        self._check_space()
        self.target.set_size(self.head.tail_offset)
        for piece in self.head.pieces:
            data = piece.data
            if piece.offset == self.target.offset:
                data = bytes(len(MAGIC)) + data[len(MAGIC):]
            self.write_at(piece.offset, data)

    def write_pages(self, selections: Sequence[Bitmap] | None = None) -> None:
        """One pass over all blocks, or over the pages that ``selections`` has of each."""
        file = core_file(self.target.fd, self.target.direct)
        self._pass(self.channels, file, self.bitmaps, selections)

    def clean(self) -> int:
        """Make every page whose bit is clear read as zeros in the file: earlier passes, or an
        earlier snapshot, may have left bytes there. Returns how many pages had some."""
        found = 0
        fault = _core.ffi.new("struct qm_fault *")
        channel = _core.ffi.gc(_core.lib.qm_channel_create(), _core.lib.qm_channel_destroy)
        with self.target.opened_for_reading() as fd:
            file = core_file(fd, None)
            for bitmap, layout in zip(self.bitmaps, self.head.blocks, strict=True):
                for item in cut(0, layout.num_pages, layout.page_size):
                    count = _core.lib.qm_clean(
                        self.channels.core, channel, file, core_block(layout), bitmap.core,
                        item.first, item.npages, fault,
                    )
                    if count < 0:
                        raise failure(count, fault, self.target.name, layout.name)
                    found += count
        return found

    def finish(
        self, sections: bytes = b"", description: bytes | None = None, *,
        switchover_start: bool = False,
    ) -> SaveReport:
        """Write bitmaps and tail (device ``sections`` verbatim), then publish."""
        tail = encode_tail(
            sections=sections, description=description, switchover_start=switchover_start,
            page_size=self.head.blocks[0].page_size,
        )
        for bitmap, layout in zip(self.bitmaps, self.head.blocks, strict=True):
            bitmap.write_to(self, layout.bitmap_offset, everything=self.reuse)
        self.write_at(self.head.tail_offset, tail)
        self._check_cancelled()
        self.target.publish(MAGIC, self._check_cancelled)
        _core.lib.qm_job_add_moved(self.channels.core, len(MAGIC))
        return self._report()

    def _check_cancelled(self) -> None:
        if self.channels.cancelled:
            raise Cancelled("cancelled")

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write through the buffered descriptor, and count it."""
        self.target.write_at(offset, data)
        _core.lib.qm_job_add_moved(self.channels.core, len(data))

    def _check_space(self) -> None:
        """Fail before the first page where the data cannot fit; count it only if in doubt."""
        free = self.target.free_bytes()
        if free is None:
            return
        dense = self.sparse is Sparse.DENSE
        need = sum(m.length if dense else m.extent_bytes for m in self.memories)
        if need > free and not dense:
            need = self._count()
        if need > free:
            raise NoSpace(
                f"the pages to save need {need >> 20} MiB and {free >> 20} MiB are free",
                self.target.name,
            )

    def _count(self) -> int:
        """Bytes of the pages that are not zero."""
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
        self, channels: Channels, file: Any, bitmaps: Sequence[Bitmap],
        selections: Sequence[Bitmap] | None,
    ) -> None:
        layouts = self.head.blocks
        names = [layout.name for layout in layouts]
        # What every call on a block gets, whichever its range.
        common = [
            (file, core_block(layout), memory.core, self.policy,
             selections[n].core if selections else _core.ffi.NULL, bitmaps[n].core)
            for n, (layout, memory) in enumerate(zip(layouts, self.memories, strict=True))
        ]

        def move(channel: Any, item: Range, fault: Any) -> int:
            return _core.lib.qm_write(
                channels.core, channel, *common[item.block], item.first, item.npages, fault
            )

        channels.run(
            (item for n, layout in enumerate(layouts)
             for item in cut(n, layout.num_pages, layout.page_size)),
            move, self.target.name, names,
        )
        # Every direct write has returned: now what shares a file block with none of them.
        fault = _core.ffi.new("struct qm_fault *")
        channel = _core.ffi.gc(_core.lib.qm_channel_create(), _core.lib.qm_channel_destroy)
        for name, arguments in zip(names, common, strict=True):
            rc = _core.lib.qm_write_tail(channels.core, channel, *arguments, fault)
            if rc:
                raise failure(rc, fault, self.target.name, name)

    def _report(self) -> SaveReport:
        totals = self.channels.totals()
        direct = self.target.direct
        report = SaveReport(
            data_pages=totals.data_pages,
            zero_pages=totals.zero_pages,
            bytes_written=totals.bytes_moved,
            bytes_allocated=self.target.allocated_bytes(),
            file_size=os.fstat(self.target.fd).st_size,
            seconds=time.monotonic() - self.started,
            direct_io=direct is not None,
            direct_io_reason=self.target.direct_io_reason,
            channels=self.channels.count,
            sparse=self.sparse,
            unaligned_blocks=tuple(
                m.name for m in self.memories if direct and m.unaligned(direct.mem_align)
            ),
        )
        logger.info("saved %s: %s", self.target.name, report)
        return report
