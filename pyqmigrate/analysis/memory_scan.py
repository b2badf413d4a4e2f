"""Look at the memory of a snapshot in windows: read by several threads, given out in order."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from pyqmigrate.analysis.stretches import Stretch
from pyqmigrate.core import Channel, JobState
from pyqmigrate.errors import Cancelled
from pyqmigrate.integrity.digests import open_direct
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import check_channels
from pyqmigrate.io.direct_io import Direct, DirectIO
from pyqmigrate.io.input import InputFile, Source
from pyqmigrate.io.job import Progress
from pyqmigrate.io.threads import starting_threads
from pyqmigrate.io.windows import FIRST_MULTIPLE, PagesInFile, Window, WindowReader
from pyqmigrate.snapshot.base import Block, Snapshot, error_from_errno
from pyqmigrate.snapshot.increment import IncrementBlock
from pyqmigrate.snapshot.mapped_ram import MappedRamBlock

__all__ = ["MemoryScan", "Piece", "Reach", "Spans", "View"]

_WINDOW = 8 << 20  # bytes that a thread looks at in one go
_AHEAD = 2  # windows for the caller, beside those of the threads
_REPORT_EVERY = 0.1  # seconds

# What a search found in some bytes: the starts of its results, their ends unless their length is known,
# and where to go on.
Spans: TypeAlias = "tuple[array[int], array[int] | None, int]"


@dataclass(frozen=True)
class Reach:
    """What a search has to see around the bytes ``[start, end)`` in which its results start.

    ``before`` and ``after``: bytes of context. ``leading_zeros``: how many zero bytes before data can
    belong to a result. ``zeros``: whether results can consist of zeros, so that memory without data
    counts too; ``unread``: of such memory a piece is given out, not a view.
    """

    before: int = 0
    after: int = 0
    leading_zeros: int = 0
    zeros: bool = False
    unread: bool = False


@dataclass(frozen=True)
class Piece:
    """Bytes ``[start, end)`` of a stretch. ``zero``: they are known to be zeros, and are not read."""

    stretch: Stretch
    start: int
    end: int
    zero: bool = False

    def follows(self, other: Piece) -> bool:
        """Return whether it begins where the other one ends, in the same block."""
        return self.stretch.block is other.stretch.block and self.start == other.end

    def start_address(self) -> int | None:
        """Return the guest-physical address of its first byte, if that is known."""
        return self.stretch.address_of(self.start)

    def end_address(self) -> int | None:
        """Return the address after that of its last byte."""
        return self.stretch.address_of(self.end)


@dataclass(frozen=True)
class View:
    """``data`` are the bytes of the piece's block from byte ``base`` on, context included, until the
    next view is asked for; ``spans`` is what the search found in it."""

    piece: Piece
    base: int
    data: memoryview
    spans: Spans


class MemoryScan:
    """A pass over stretches of a snapshot's memory. Close it; closing the snapshot ends it.

    ``search(data, start, end)`` is called by ``channels`` threads for ``data[start:end]``. Memory is
    bounded by a window of some 9 MiB for each thread and two more. Raises TargetError if the file
    cannot be opened for reading.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        stretches: Sequence[Stretch],
        reach: Reach,
        search: Callable[[memoryview, int, int], Spans],
        *,
        channels: int = 2,
        progress: Callable[[Progress], object] | None = None,
    ) -> None:
        self._snapshot, self._stretches = snapshot, stretches
        self._reach, self._search = reach, search
        self._count = check_channels(channels)
        self._progress = progress
        self._total = 0
        self._bytes_before: dict[Stretch, int] = {}  # of the stretches before it
        for stretch in stretches:
            self._bytes_before[stretch] = self._total
            self._total += stretch.end - stretch.start
        self._job = JobState()
        self._pool = ThreadPoolExecutor(self._count, "pyqmigrate-search")
        self._local = threading.local()
        self._readers: dict[str, WindowReader] = {}
        self._windows: list[Window] = []
        self._started = self._reported = time.monotonic()
        self._cleanup = contextlib.ExitStack()
        snapshot.attach(self)
        self._cleanup.callback(snapshot.detach, self)
        try:
            direct = _DirectFiles(self._cleanup)
            for block in {stretch.block.name: stretch.block for stretch in stretches}.values():
                layers = _layers(block, direct, self._cleanup)
                memory = block.memory()
                self._readers[block.name] = WindowReader(memory, block.page_size, layers, self._job)
        except BaseException:
            self.close()
            raise

    @property
    def bytes_read(self) -> int:
        """How much was read from the file so far."""
        return self._job.totals().bytes_moved

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def views(self) -> Iterator[View | Piece]:
        """Yield what was found, in the order of the stretches, and close the scan at the end; once.

        Raises SnapshotError, TargetError, MemoryError, Cancelled if the snapshot is closed.
        """
        pending: deque[tuple[Piece, Window | None, Future[View] | None]] = deque()
        free: list[Window] = []
        pieces = self._pieces()
        try:
            while True:
                while len(pending) < self._count + _AHEAD:
                    piece = next(pieces, None)
                    if piece is None:
                        break
                    pending.append(self._begin(piece, free))
                if not pending:
                    return
                piece, window, future = pending.popleft()
                if window is None or future is None:
                    yield piece
                else:
                    yield future.result()
                    free.append(window)
                self._report(piece)
        finally:
            self.close()

    def _begin(
        self, piece: Piece, free: list[Window]
    ) -> tuple[Piece, Window | None, Future[View] | None]:
        if piece.zero:
            return piece, None, None
        if free:
            window = free.pop()
        else:
            window = Window(self._window_size())
            self._windows.append(window)
        try:
            with starting_threads():
                return piece, window, self._pool.submit(self._look, piece, window)
        except RuntimeError:  # the pool has ended
            raise Cancelled("cancelled") from None

    def _window_size(self) -> int:
        page = max(stretch.block.page_size for stretch in self._stretches)
        around = self._reach.before + self._reach.after
        return _WINDOW + around + (2 * FIRST_MULTIPLE + 2) * page

    def _pieces(self) -> Iterator[Piece]:
        """Split the stretches. Every byte is in one piece, but for memory that no result starts in."""
        reach = self._reach
        for stretch in self._stretches:
            position, end = stretch.start, stretch.end
            while position < end:
                start = (
                    position if reach.zeros and not reach.unread else self._start(stretch, position)
                )
                if start > position and reach.unread:
                    yield Piece(stretch, position, start, zero=True)
                if start == end:
                    break
                multiple = FIRST_MULTIPLE * stretch.block.page_size
                position = min(start // multiple * multiple + _WINDOW, end)
                yield Piece(stretch, start, position)

    def _start(self, stretch: Stretch, position: int) -> int:
        """Return the first byte from ``position`` on that a result may start at, at most the end."""
        leading = self._reach.leading_zeros
        limit = min(stretch.end + leading, stretch.block.length)
        data = self._next_data(stretch.block, position, limit)
        if data == limit:
            return stretch.end
        return min(max(position, data - leading), stretch.end)

    def _next_data(self, block: Block, position: int, limit: int) -> int:
        try:
            return self._readers[block.name].next_data(position, limit)
        except OSError as error:
            raise self._error(error, block) from None

    def _look(self, piece: Piece, window: Window) -> View:
        """Read a piece and search in it; on a thread of the pool."""
        block, reach = piece.stretch.block, self._reach
        multiple = FIRST_MULTIPLE * block.page_size
        base = max(piece.start - reach.before, 0) // multiple * multiple
        limit = min(piece.end + reach.after, block.length)
        first = base // block.page_size
        npages = -(-limit // block.page_size) - first
        try:
            data = self._readers[block.name].read(self._channel(), window, first, npages)
        except OSError as error:
            raise self._error(error, block) from None
        spans = self._search(data, piece.start - base, piece.end - base)
        return View(piece, base, data, spans)

    def _channel(self) -> Channel:
        channel: Channel | None = getattr(self._local, "channel", None)
        if channel is None:
            channel = self._local.channel = Channel()
        return channel

    def _error(self, error: OSError, block: Block) -> BaseException:
        number = error.errno or errno.EIO
        if number == errno.ECANCELED:
            return Cancelled("cancelled")
        if number == errno.ENOMEM:
            return MemoryError()
        return error_from_errno(number, self._snapshot.source, block.name)

    def _report(self, piece: Piece) -> None:
        now = time.monotonic()
        if self._progress is None or now - self._reported < _REPORT_EVERY:
            return
        self._reported = now
        totals, seconds = self._job.totals(), now - self._started
        done = self._bytes_before[piece.stretch] + piece.end - piece.stretch.start
        self._progress(
            Progress(
                bytes_done=done,
                bytes_total=self._total,
                data_pages=totals.data_pages,
                zero_pages=totals.zero_pages,
                bytes_moved=totals.bytes_moved,
                seconds=seconds,
                rate=done / seconds if seconds else 0.0,
            )
        )

    def cancel(self) -> None:
        """Stop the threads, without waiting."""
        self._job.cancel()

    def join(self) -> None:
        """Wait until no thread reads any more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Stop, and free everything. Idempotent."""
        self.cancel()
        self.join()
        self._cleanup.close()
        while self._windows:
            self._windows.pop().close()


class _DirectFiles:
    """Opens the direct descriptors of files that are better read past the page cache."""

    def __init__(self, cleanup: contextlib.ExitStack) -> None:
        self._cleanup = cleanup
        self._known: dict[int, Direct | None] = {}

    def of(self, source: Source) -> Direct | None:
        key = id(source)
        if key not in self._known:
            direct = None
            if isinstance(source, InputFile):
                direct, _ = open_direct(source, DirectIO.AUTO)
                self._cleanup.callback(source.close_direct, direct)
            self._known[key] = direct
        return self._known[key]


def _layers(block: Block, direct: _DirectFiles, cleanup: contextlib.ExitStack) -> list[PagesInFile]:
    """Return where the pages of the block are in files; nothing if they have no fixed places."""
    if isinstance(block, MappedRamBlock):
        return [_pages_in_file(block, block.bitmap, direct)]
    if isinstance(block, IncrementBlock):
        rest = block.base_only()
        cleanup.callback(rest.close)
        return [
            _pages_in_file(block.base, rest, direct),
            _pages_in_file(block.changed, block.changed.bitmap, direct),
        ]
    return []


def _pages_in_file(block: MappedRamBlock, bitmap: Bitmap, direct: _DirectFiles) -> PagesInFile:
    source = block.snapshot.source
    return PagesInFile(source.fd, direct.of(source), block.layout, bitmap)
