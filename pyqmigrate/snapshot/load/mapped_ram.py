"""Load the pages of an open, checked mapped-ram file into guest memory."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyqmigrate.core import File, Policy
from pyqmigrate.enums import Clear, parse_enum
from pyqmigrate.errors import SnapshotError, TargetError
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, check_channels, selected_ranges, split_ranges
from pyqmigrate.io.direct_io import Direct, DirectIO
from pyqmigrate.io.input import Source
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, OpenMemory
from pyqmigrate.log import logger
from pyqmigrate.snapshot.load.memories import match_memories, open_memory

__all__ = ["Layer", "LoadReport", "start_load", "start_load_layers"]

# Reads into fresh memory wait for page faults: more threads than channels hide that.
_THREADS_A_CHANNEL = 4
_MOST_THREADS = 16

# Reading over a gap of this length costs less than another call.
_READ_GAP = 128 << 10


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
    return start_load_layers(
        [Layer(source, blocks)], memories, channels=channels, direct_io=direct_io, clear=clear
    )


@dataclass(frozen=True)
class Layer:
    """A file, and the blocks whose pages come from it where their bitmap has bits set."""

    source: Source
    blocks: Sequence[tuple[BlockLayout, Bitmap]]


def start_load_layers(
    layers: Sequence[Layer],
    memories: Mapping[str, Memory],
    *,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    clear: Clear | str = Clear.ZERO,
) -> Job[LoadReport]:
    """Start to load pages from several files, which have the same blocks; return at once.

    Each page is in one layer at most; ``clear`` says what becomes of the others. Otherwise like
    :func:`start_load`.
    """
    load = _Load(
        layers,
        memories,
        check_channels(channels),
        parse_enum(DirectIO, direct_io, "direct_io"),
        parse_enum(Clear, clear, "clear"),
    )
    try:
        return Job(load.channels, load.total, load.run)
    except BaseException:
        load.close()
        raise


class _Load:
    """A load. It owns the memories and the direct descriptors until run() ends."""

    def __init__(
        self,
        layers: Sequence[Layer],
        memories: Mapping[str, Memory],
        channels: int,
        direct_io: DirectIO,
        clear: Clear,
    ) -> None:
        self.started = time.monotonic()
        blocks = layers[0].blocks
        match_memories([layout.name for layout, _ in blocks], memories)
        self.layers = layers
        self.clear = clear
        self.total = sum(layout.length for layout, _ in blocks) + sum(
            item.npages * layout.page_size
            for layer in layers[1:]
            for layout, bitmap in layer.blocks
            for item in selected_ranges(0, bitmap, layout.page_size)
        )
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
                    source_fd=layers[0].source.file_fd,
                )
                stack.callback(memory.close)
                self.memories.append(memory)
                for layer in layers[1:]:
                    memory.refuse_as_source(layer.source.file_fd)
            self.direct: list[Direct | None] = []
            for layer in layers:
                direct, self.reason = layer.source.open_direct(direct_io)
                stack.callback(layer.source.close_direct, direct)
                self.direct.append(direct)
            self._cleanup = stack.pop_all()

    def close(self) -> None:
        self._cleanup.close()

    def run(self) -> LoadReport:
        with self._cleanup:
            for number in range(len(self.layers)):
                self._read_pages(number)
            return self._report()

    def _read_pages(self, number: int) -> None:
        """Read the pages of one layer. The first one clears pages that no layer has."""
        layer = self.layers[number]
        clear = self.clear if number == 0 else Clear.LEAVE
        # A restore that has QEMU read the pages does without.
        from pyqmigrate.io.pages import BlockPages, read_pages

        try:
            read_pages(
                [
                    BlockPages(layout, bitmap, memory)
                    for (layout, bitmap), memory in zip(layer.blocks, self.memories, strict=True)
                ],
                File(layer.source.fd, self.direct[number]),
                Policy(max_gap=_READ_GAP, zero_clear=clear is Clear.ZERO),
                self.channels,
                layer.source.name,
                self._ranges(number, clear),
            )
        except TargetError as error:
            if error.errno == errno.ENODATA:
                raise SnapshotError(
                    "the file ends within a page that is marked as present: truncated",
                    offset=error.position,
                ) from error
            raise

    def _ranges(self, number: int, clear: Clear) -> Iterator[Range]:
        """Yield the ranges of a layer; with ``leave`` only those with data."""
        for block, (layout, bitmap) in enumerate(self.layers[number].blocks):
            if number:
                yield from selected_ranges(block, bitmap, layout.page_size)
                continue
            for item in split_ranges(block, layout.num_pages, layout.page_size):
                if clear is Clear.ZERO or bitmap.may_hold(item.first, item.npages):
                    yield item
                else:
                    length = item.npages * layout.page_size
                    self.channels.core.count_pages(length, zero_pages=item.npages)

    def _report(self) -> LoadReport:
        totals = self.channels.totals()
        aligned = [direct.mem_align for direct in self.direct if direct is not None]
        pages = sum(layout.num_pages for layout, _ in self.layers[0].blocks)
        report = LoadReport(
            data_pages=totals.data_pages,
            zero_pages=pages - totals.data_pages,
            bytes_read=totals.bytes_moved,
            seconds=time.monotonic() - self.started,
            direct_io=bool(aligned),
            direct_io_reason=self.reason,
            channels=self.count,
            unaligned_blocks=tuple(
                memory.name for memory in self.memories if any(map(memory.unaligned, aligned))
            ),
        )
        logger.info("loaded %s: %s", self.layers[-1].source.name, report)
        return report
