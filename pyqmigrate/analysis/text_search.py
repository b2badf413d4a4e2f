"""Printable strings in the memory of a guest, as ``strings`` finds them in a file.

with open_snapshot("/snap/guest.mapped") as snapshot:
    for text in strings(snapshot, 8):
        print(text.block, hex(text.offset), text.text)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from pyqmigrate.analysis.addresses import placements
from pyqmigrate.analysis.memory_scan import MemoryScan, Piece, Reach, Spans, View
from pyqmigrate.analysis.scan_results import ScanResults
from pyqmigrate.analysis.stretches import Stretch, stretches
from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.errors import UsageError
from pyqmigrate.io.byte_search import StringSearch
from pyqmigrate.io.job import Progress
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["LONGEST_TEXT", "Text", "TextSearch", "strings"]

LONGEST_TEXT = 1 << 20  # bytes


@dataclass(frozen=True)
class Text:
    """A string at ``offset`` of a block, of ``length`` bytes there; ``address`` is guest-physical, or
    None."""

    block: str
    offset: int
    address: int | None
    text: str
    length: int


def strings(
    snapshot: Snapshot,
    least: int = 4,
    *,
    utf_16: bool = False,
    block: str | None = None,
    addresses: tuple[int, int] | None = None,
    channels: int = 2,
    progress: Callable[[Progress], object] | None = None,
) -> TextSearch:
    """Return an iterator over the runs of at least ``least`` printable characters, in the order of
    :func:`~pyqmigrate.analysis.search.find`, whose other arguments and errors these are.

    Printable are ASCII and tab; with ``utf_16`` these characters in UTF-16LE, at any byte. A string
    lies in contiguous addresses of one block; one of more than 1 MiB is given in parts.
    """
    check("least", least, int)
    check("utf_16", utf_16, bool)
    check_callback("progress", progress)
    if not 1 <= least <= LONGEST_TEXT // 2:
        raise UsageError(f"a string has at least 1 to {LONGEST_TEXT // 2} characters, not {least}")
    snapshot.prepare_random_reads(progress)
    placed, why_not = placements(snapshot, progress)
    chosen = stretches(snapshot, placed, block, addresses)
    return TextSearch(
        snapshot, chosen, least, utf_16, channels, progress, () if why_not is None else (why_not,)
    )


class TextSearch(ScanResults[Text]):
    """A search for strings that is going on."""

    def __init__(
        self,
        snapshot: Snapshot,
        chosen: list[Stretch],
        least: int,
        utf_16: bool,
        channels: int,
        progress: Callable[[Progress], object] | None,
        notes: tuple[str, ...],
    ) -> None:
        self._width = 2 if utf_16 else 1
        self._search = StringSearch(least, self._width)
        reach = Reach(after=self._width - 1)
        scan = MemoryScan(snapshot, chosen, reach, self._find, channels=channels, progress=progress)
        super().__init__(scan, self._all(), notes)

    def _find(self, data: memoryview, start: int, end: int) -> Spans:
        numbers, position = self._search.find(data, start, end)
        return numbers, None, position

    def count(self) -> int:
        """Return the number of strings that are left."""
        return sum(1 for _ in self)

    def _all(self) -> Generator[Text, None, None]:
        open_run = _OpenRun(self._search.least, self._width)
        last: Piece | None = None
        for view in self._scan.views():
            assert isinstance(view, View)  # zeros are not asked for
            piece = view.piece
            if (
                last is None
                or not piece.follows(last)
                or piece.start_address() != last.end_address()
            ):
                yield from open_run.end()
            last = piece
            spans, end = view.spans, piece.end - view.base
            while True:
                numbers, _, position = spans
                for index in range(0, len(numbers), 2):
                    start, stop = numbers[index], numbers[index + 1]
                    yield from open_run.add(
                        piece.stretch, view.base + start, bytes(view.data[start:stop])
                    )
                if position >= end:
                    break
                spans = self._find(view.data, position, end)
        yield from open_run.end()


class _OpenRun:
    """The string that may go on in the next piece, and what becomes of it."""

    def __init__(self, least: int, width: int) -> None:
        self._least, self._width = least, width
        self._stretch: Stretch | None = None
        self._offset = 0
        self._bytes = bytearray()

    def add(self, stretch: Stretch, offset: int, data: bytes) -> Iterator[Text]:
        """Add characters; yield the string before, if they do not continue it."""
        if self._offset + len(self._bytes) != offset or len(self._bytes) >= LONGEST_TEXT:
            yield from self.end()
        if not self._bytes:
            self._stretch, self._offset = stretch, offset
        self._bytes += data

    def end(self) -> Iterator[Text]:
        """Yield the string, unless it is too short, and forget it."""
        data = bytes(self._bytes)
        self._bytes.clear()
        for start in range(0, len(data), LONGEST_TEXT):
            part = data[start : start + LONGEST_TEXT]
            if len(part) // self._width >= self._least:
                yield self._text(self._offset + start, part)

    def _text(self, offset: int, data: bytes) -> Text:
        assert self._stretch is not None
        return Text(
            self._stretch.block.name,
            offset,
            self._stretch.address_of(offset),
            data.decode("ascii" if self._width == 1 else "utf-16-le"),
            len(data),
        )
