"""Find bytes in the memory of a guest.

    with open_snapshot("/snap/guest.mapped") as snapshot:
        for match in find(snapshot, b"BEGIN RSA PRIVATE KEY"):
            print(match.block, hex(match.offset), match.address)

Memory without data is not read. All of it counts as zeros: a match may begin or end there, or consist of
it. A match lies in one block. Blocks are contiguous by their offsets: a match may lie across two ranges of
guest-physical addresses; its address is that of its first byte.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from pyqmigrate.analysis.addresses import placements
from pyqmigrate.analysis.matchers import Expression, Match, Matcher, Plain, Run
from pyqmigrate.analysis.memory_scan import MemoryScan, Piece, Spans, View
from pyqmigrate.analysis.scan_results import ScanResults
from pyqmigrate.analysis.stretches import stretches
from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.errors import UsageError
from pyqmigrate.io.job import Progress
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["CONTEXT_MAX", "Match", "Search", "find"]

CONTEXT_MAX = 64 << 10  # bytes on each side of a match


def find(
    snapshot: Snapshot,
    pattern: bytes,
    *,
    regex: bool = False,
    block: str | None = None,
    addresses: tuple[int, int] | None = None,
    context: int = 0,
    channels: int = 2,
    progress: Callable[[Progress], object] | None = None,
) -> Search:
    """Return an iterator over the places where ``pattern`` is in the guest's memory.

    They come in the order of their guest-physical addresses, those without an address last, while
    the search goes on. Of matches that overlap only the first is given, as by ``bytes.count``.

    pattern: at most 4096 bytes; or with ``regex`` a regular expression in the syntax of Python's
        ``re``, for bytes. A match of up to 64 KiB is found whole, a longer one may be given in parts;
        lookbehind reaches as far. ``^`` and ``$`` match at the edges of a block. Empty matches do
        not count. An expression that matches zeros is also tried on memory without data.
    block: the name of the only block to search.
    addresses: the first and the end of the guest-physical addresses at which matches start.
    context: bytes to give from before and after each match, at most 64 KiB.
    channels: threads that read and search, 1 to 255.
    progress: called at most ten times a second, on the thread that iterates.

    Close the iterator unless it is exhausted; closing the snapshot ends it. Raises BlockMismatch,
    UsageError, NotSupported for a stream that cannot be read at random (a compressed one) and for
    ``addresses`` if none are known. The iterator raises SnapshotError for a damaged file, TargetError,
    Cancelled.
    """
    check("pattern", pattern, bytes)
    check("regex", regex, bool)
    check("context", context, int)
    check_callback("progress", progress)
    if not 0 <= context <= CONTEXT_MAX:
        raise UsageError(f"context must be 0 to {CONTEXT_MAX} bytes, not {context}")
    matcher: Matcher = Expression(pattern) if regex else Plain(pattern)
    snapshot.prepare_random_reads(progress)
    placed, why_not = placements(snapshot, progress)
    chosen = stretches(snapshot, placed, block, addresses)
    scan = MemoryScan(
        snapshot, chosen, matcher.reach(context), matcher.find, channels=channels, progress=progress
    )
    return Search(scan, matcher, context, () if why_not is None else (why_not,))


class Search(ScanResults[Match]):
    """A search that is going on."""

    def __init__(
        self, scan: MemoryScan, matcher: Matcher, context: int, notes: tuple[str, ...]
    ) -> None:
        super().__init__(scan, self._all(), notes)
        self._matcher, self._context = matcher, context
        self._runs = self._found()

    @property
    def engine(self) -> str:
        """What searches: ``bytes``, ``re`` or ``re2``."""
        return self._matcher.engine

    def count(self) -> int:
        """Return the number of matches that are left, without making objects of them."""
        return sum(len(run.starts) for run in self._runs)

    def _all(self) -> Generator[Match, None, None]:
        for run in self._runs:
            yield from run.matches(self._context)

    def _found(self) -> Generator[Run, None, None]:
        """Yield runs of matches. A match that reaches into the next piece hides those that overlap
        it there: that piece is searched again behind it."""
        last: Piece | None = None
        upto = 0  # the end of the last match, a byte of its block
        for view in self._scan.views():
            piece = view if isinstance(view, Piece) else view.piece
            if last is None or not piece.follows(last):
                upto = 0
            last = piece
            start = max(piece.start, upto)
            for run in self._runs_of(view, start):
                if run.starts:
                    upto = run.end
                    yield run

    def _runs_of(self, view: View | Piece, start: int) -> Iterator[Run]:
        if isinstance(view, Piece):
            yield self._matcher.zeros(view, start)
            return
        piece = view.piece
        spans: Spans | None = view.spans if start == piece.start else None
        position, end = start - view.base, piece.end - view.base
        while position < end:
            if spans is None:
                spans = self._matcher.find(view.data, position, end)
            position = spans[2]
            yield self._matcher.run(view, spans)
            spans = None

    def close(self) -> None:
        """End the search. Idempotent."""
        self._runs.close()
        super().close()
