"""Load the pages of an open, checked mapped-ram file into guest memory."""

from __future__ import annotations

import contextlib
import enum
import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyqmigrate.core import File, Policy
from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import SnapshotError, TargetError
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, check_channels, split_ranges
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.input import Source
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, OpenMemory
from pyqmigrate.log import logger
from pyqmigrate.snapshot.load.memories import match_memories, open_memory

__all__ = ["Clear", "LoadReport", "start_load"]

# Reads into fresh memory wait for page faults: more threads than channels hide that.
_THREADS_A_CHANNEL = 4
_MOST_THREADS = 16

# Reading over a gap of this length costs less than another call.
_READ_GAP = 128 << 10


class Clear(enum.StrEnum):
    """What to do with pages without data: ``zero`` makes them zero (holes, if the memory is a
    file), ``leave`` does not touch them, for memory that is known to be fresh."""

    ZERO = "zero"
    LEAVE = "leave"


@dataclass(frozen=True)
class LoadReport:
    """What a load did. Fields are those of :class:`~pyqmigrate.snapshot.save.writer.SaveReport`;
    ``bytes_read`` includes the gaps that were read over."""

    data_pages: int
    zero_pages: int
    bytes_read: int
    seconds: float
    direct_io: bool
    direct_io_reason: str
    channels: int
    unaligned_blocks: tuple[str, ...]


def start_load(
    source: Source,
    blocks: Sequence[tuple[BlockLayout, Bitmap]],
    memories: Mapping[str, Memory],
    *,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    clear: Clear | str = Clear.ZERO,
) -> Job[LoadReport]:
    """Start to load the blocks into the memories of the same names; return at once.

    ``source`` and the bitmaps must stay open until the job has ended. Raises BlockMismatch for
    unknown, missing or mis-sized memories, UsageError for other bad arguments, TargetError
    (DirectIORefused). The job's result raises SnapshotError if the file has become shorter,
    GuestMemoryError, TargetError, Cancelled.
    """
    load = _Load(
        source,
        blocks,
        memories,
        check_channels(channels),
        parse_enum(DirectIO, direct_io, "direct_io"),
        parse_enum(Clear, clear, "clear"),
    )
    try:
        return Job(load.channels, sum(layout.length for layout, _ in blocks), load.run)
    except BaseException:
        load.close()
        raise


class _Load:
    """A load. It owns the memories and the direct descriptor until run() ends."""

    def __init__(
        self,
        source: Source,
        blocks: Sequence[tuple[BlockLayout, Bitmap]],
        memories: Mapping[str, Memory],
        channels: int,
        direct_io: DirectIO,
        clear: Clear,
    ) -> None:
        self.started = time.monotonic()
        match_memories([layout.name for layout, _ in blocks], memories)
        self.source = source
        self.blocks = blocks
        self.clear = clear
        self.count = channels
        threads = max(channels, min(channels * _THREADS_A_CHANNEL, _MOST_THREADS))
        self.channels = Channels(threads, "pyqmigrate-load")
        with contextlib.ExitStack() as stack:
            self.memories: list[OpenMemory] = []
            for layout, _ in blocks:
                memory = open_memory(
                    layout.name,
                    memories[layout.name],
                    layout.length,
                    writable=True,
                    source_fd=source.file_fd,
                )
                stack.callback(memory.close)
                self.memories.append(memory)
            self.direct, self.reason = source.open_direct(direct_io)
            stack.callback(source.close_direct, self.direct)
            self._cleanup = stack.pop_all()

    def close(self) -> None:
        self._cleanup.close()

    def run(self) -> LoadReport:
        with self._cleanup:
            self._read_pages()
            return self._report()

    def _read_pages(self) -> None:
        # A restore that has QEMU read the pages does without.
        from pyqmigrate.io.pages import BlockPages, read_pages

        try:
            read_pages(
                [
                    BlockPages(layout, bitmap, memory)
                    for (layout, bitmap), memory in zip(self.blocks, self.memories, strict=True)
                ],
                File(self.source.fd, self.direct),
                Policy(max_gap=_READ_GAP, zero_clear=self.clear is Clear.ZERO),
                self.channels,
                self.source.name,
                (item for n in range(len(self.blocks)) for item in self._ranges(n)),
            )
        except TargetError as error:
            if error.errno == errno.ENODATA:
                raise SnapshotError(
                    "the file ends within a page that is marked as present: truncated",
                    offset=error.position,
                ) from error
            raise

    def _ranges(self, number: int) -> Iterator[Range]:
        """Yield the ranges of a block; with ``leave`` only those with data."""
        layout, bitmap = self.blocks[number]
        for item in split_ranges(number, layout.num_pages, layout.page_size):
            if self.clear is Clear.ZERO or bitmap.may_hold(item.first, item.npages):
                yield item
            else:
                length = item.npages * layout.page_size
                self.channels.core.count_pages(length, zero_pages=item.npages)

    def _report(self) -> LoadReport:
        totals = self.channels.totals()
        direct = self.direct
        report = LoadReport(
            data_pages=totals.data_pages,
            zero_pages=totals.zero_pages,
            bytes_read=totals.bytes_moved,
            seconds=time.monotonic() - self.started,
            direct_io=direct is not None,
            direct_io_reason=self.reason,
            channels=self.count,
            unaligned_blocks=tuple(
                m.name for m in self.memories if direct and m.unaligned(direct.mem_align)
            ),
        )
        logger.info("loaded %s: %s", self.source.name, report)
        return report
