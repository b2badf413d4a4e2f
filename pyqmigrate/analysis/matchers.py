"""What a search looks for: plain bytes, or a regular expression; and the runs of matches found."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pyqmigrate.analysis.memory_scan import Piece, Reach, Spans, View
from pyqmigrate.analysis.regular_expression import LONGEST_MATCH, RegularExpression
from pyqmigrate.errors import UsageError
from pyqmigrate.io.byte_search import BytePattern

__all__ = ["PATTERN_MAX", "Expression", "Match", "Matcher", "Plain", "Run"]

PATTERN_MAX = 4096  # bytes of a plain pattern


@dataclass(frozen=True)
class Match:
    """Bytes ``data`` at ``offset`` of a block.

    ``address`` is guest-physical, None if it is not known. ``before`` and ``after`` are the bytes
    around it, fewer at the edges of the block.
    """

    block: str
    offset: int
    address: int | None
    data: bytes
    before: bytes = b""
    after: bytes = b""


@dataclass(frozen=True)
class Run:
    """Matches in one view, or in zeros that were not read: the bytes of the block at ``starts``,
    relative to ``base``, up to ``ends``, or ``length`` of them."""

    view: View | Piece
    base: int
    starts: Sequence[int]
    ends: Sequence[int] | None = None
    length: int = 0

    @property
    def end(self) -> int:
        """The first byte of the block after the last match."""
        last = self.starts[-1] + self.length if self.ends is None else self.ends[-1]
        return self.base + last

    def matches(self, context: int) -> Iterator[Match]:
        """Yield them, with so many bytes of context. The view must be valid."""
        for number, start in enumerate(self.starts):
            end = start + self.length if self.ends is None else self.ends[number]
            yield self._match(start, end, context)

    def _match(self, start: int, end: int, context: int) -> Match:
        if isinstance(self.view, Piece):
            return self._of_zeros(self.view, start, end, context)
        data, stretch = self.view.data, self.view.piece.stretch
        limit = min(end + context, stretch.block.length - self.base)
        return Match(
            stretch.block.name,
            self.base + start,
            stretch.address_of(self.base + start),
            bytes(data[start:end]),
            bytes(data[max(start - context, 0) : start]),
            bytes(data[end:limit]),
        )

    def _of_zeros(self, piece: Piece, start: int, end: int, context: int) -> Match:
        block = piece.stretch.block
        first, last = max(start - context, 0), min(end + context, block.length)
        around = block.read(first, last - first) if context else bytes(end - start)
        head = start - first if context else 0
        return Match(
            block.name,
            start,
            piece.stretch.address_of(start),
            bytes(end - start),
            around[:head],
            around[head + end - start :],
        )


class Matcher(Protocol):
    """Finds matches in windows of memory. ``engine`` names what searches."""

    engine: str

    def reach(self, context: int) -> Reach: ...
    def find(self, data: memoryview, start: int, end: int) -> Spans: ...
    def run(self, view: View, spans: Spans) -> Run: ...
    def zeros(self, piece: Piece, start: int) -> Run: ...


class Plain:
    """Bytes as they are. UsageError if there are none, or more than 4096."""

    engine = "bytes"

    def __init__(self, pattern: bytes) -> None:
        if not 0 < len(pattern) <= PATTERN_MAX:
            raise UsageError(f"a pattern has 1 to {PATTERN_MAX} bytes, not {len(pattern)}")
        self._pattern = BytePattern(pattern)
        self._length = len(pattern)
        self._zeros = not any(pattern)
        self._leading = (
            self._length - 1
            if self._zeros
            else next(number for number, byte in enumerate(pattern) if byte)
        )

    def reach(self, context: int) -> Reach:
        return Reach(
            before=context,
            after=self._length - 1 + context,
            leading_zeros=self._leading,
            zeros=self._zeros,
            unread=self._zeros,
        )

    def find(self, data: memoryview, start: int, end: int) -> Spans:
        starts, position = self._pattern.find(data, start, end)
        return starts, None, position

    def run(self, view: View, spans: Spans) -> Run:
        return Run(view, view.base, spans[0], length=self._length)

    def zeros(self, piece: Piece, start: int) -> Run:
        end = min(piece.end, piece.stretch.block.length - self._length + 1)
        return Run(piece, 0, range(start, end, self._length), length=self._length)


class Expression:
    """A regular expression; see :class:`~pyqmigrate.analysis.regular_expression.RegularExpression`."""

    def __init__(self, pattern: bytes) -> None:
        self._expression = RegularExpression(pattern)
        self.engine = self._expression.engine

    def reach(self, context: int) -> Reach:
        return Reach(
            before=max(context, LONGEST_MATCH),
            after=LONGEST_MATCH + context,
            leading_zeros=LONGEST_MATCH,
            zeros=self._expression.matches_zeros,
        )

    def find(self, data: memoryview, start: int, end: int) -> Spans:
        return self._expression.find(data, start, end)

    def run(self, view: View, spans: Spans) -> Run:
        return Run(view, view.base, spans[0], spans[1])

    def zeros(self, piece: Piece, start: int) -> Run:
        return Run(piece, 0, array("I"))
