"""Stored snapshots: ``snapshots/<NAME>.snap``, immutable documents.

A document is its head (:mod:`pyqmigrate.format.store.snapshot_head`), one zstd frame with the body,
and the keyed digest, 16 bytes, of all before it. The body, little-endian::

    u32         packs, extents, page runs, same-filled runs, companions; one zero
    u64         length of the extents' bytes, of the seal, of the companions' bytes
    16 bytes    digest, of each pack that is needed, bases of XOR frames included
    u64         gap, of each page run: file pages since the end of the one before
    u32         pages, of each page run
    u32         place of the pack in the list, of each page run
    u32         page in the pack, of each page run, less the page after the previous run's (modulo 2^32)
    u64         gap, of each same-filled run, as for page runs
    u32         pages, of each same-filled run
    u64         the word that fills them, of each same-filled run
    u64         offset in the file, of each extent
    u64         length, of each extent
    u16         length of the suffix, of each companion
    u32         length of the content, of each companion
    the extents' bytes; the seal; suffixes, one after another; contents, one after another

The shown file has ``size`` bytes: zeros, over them the same-filled pages, over them the page runs, over
them the extents, which have what is not pages of RAM. A file page is 4096 bytes at a multiple of 4096.
Runs are in order and do not overlap; so are extents.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from operator import add

from pyqmigrate.errors import UsageError
from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.format.store.keyed import keyed_digest
from pyqmigrate.format.store.numbers import Numbers, from_bytes, to_bytes
from pyqmigrate.format.store.pack import PAGES_MAX
from pyqmigrate.format.store.snapshot_head import BODY_MAX, HeadLine, SnapshotHead, fault
from pyqmigrate.format.store.zstd import compress, decompress

__all__ = ["BODY_MAX", "COMPANION_SUFFIXES", "Extent", "FillRuns", "PageRuns", "StoredSnapshot"]

COMPANION_SUFFIXES = (".vm.json",)

_COUNTS = struct.Struct("<IIIIIIQQQ")
_LEVEL = 3  # of the body
_MASK = (1 << 32) - 1


def _empty(code: str) -> Numbers:
    return array(code)


@dataclass(frozen=True)
class Extent:
    """Bytes of the shown file at ``offset`` that are not stored as pages."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class PageRuns:
    """Runs of pages of the shown file that are consecutive pages of a pack.

    firsts: the first file page ("Q"); counts: pages; packs: the place of the pack in the list of the
    snapshot; pages: the first page in the pack ("I" each).
    """

    firsts: Numbers = field(default_factory=lambda: _empty("Q"))
    counts: Numbers = field(default_factory=lambda: _empty("I"))
    packs: Numbers = field(default_factory=lambda: _empty("I"))
    pages: Numbers = field(default_factory=lambda: _empty("I"))

    def __len__(self) -> int:
        return len(self.firsts)


@dataclass(frozen=True)
class FillRuns:
    """Runs of pages of the shown file that repeat one 8-byte word: firsts ("Q"), counts ("I") and
    words ("Q"; byte 0 of the page is the lowest)."""

    firsts: Numbers = field(default_factory=lambda: _empty("Q"))
    counts: Numbers = field(default_factory=lambda: _empty("I"))
    words: Numbers = field(default_factory=lambda: _empty("Q"))

    def __len__(self) -> int:
        return len(self.firsts)


@dataclass(frozen=True)
class StoredSnapshot:
    """A whole document. ``packs`` are digests of 16 bytes, ``seal`` is the content of the file
    ``NAME.seal``, and ``companions`` that of others by suffix."""

    head: SnapshotHead
    packs: tuple[bytes, ...]
    extents: tuple[Extent, ...]
    runs: PageRuns
    fills: FillRuns
    seal: bytes
    companions: Mapping[str, bytes] = field(default_factory=dict)

    def encode(self, key: bytes) -> bytes:
        """Return the document. UsageError if it would be larger than a reader accepts."""
        body = b"".join(self._parts())
        if len(body) > BODY_MAX:
            raise UsageError(
                f"snapshot {self.head.name!r} needs {len(body)} bytes of index and device state; at "
                f"most {BODY_MAX} are possible"
            )
        compressed = compress(body, _LEVEL)
        line = self.head.encode(key, len(self.packs), len(compressed), len(body))
        return line + compressed + keyed_digest(key, [line, compressed])

    def _parts(self) -> Iterable[bytes]:
        runs, fills = self.runs, self.fills
        suffixes = [suffix.encode("ascii") for suffix in self.companions]
        contents = list(self.companions.values())
        yield _COUNTS.pack(
            len(self.packs),
            len(self.extents),
            len(runs),
            len(fills),
            len(contents),
            0,
            sum(len(extent.data) for extent in self.extents),
            len(self.seal),
            sum(map(len, suffixes)) + sum(map(len, contents)),
        )
        yield from self.packs
        yield to_bytes(_gaps(runs.firsts, runs.counts))
        yield to_bytes(runs.counts)
        yield to_bytes(runs.packs)
        expected = chain((0,), map(add, runs.pages, runs.counts))
        steps = (
            (page - before) & _MASK for page, before in zip(runs.pages, expected, strict=False)
        )
        yield to_bytes(array("I", steps))
        yield to_bytes(_gaps(fills.firsts, fills.counts))
        yield to_bytes(fills.counts)
        yield to_bytes(fills.words)
        yield to_bytes(array("Q", (extent.offset for extent in self.extents)))
        yield to_bytes(array("Q", (len(extent.data) for extent in self.extents)))
        yield to_bytes(array("H", map(len, suffixes)))
        yield to_bytes(array("I", map(len, contents)))
        yield from (extent.data for extent in self.extents)
        yield self.seal
        yield from suffixes
        yield from contents

    @classmethod
    def decode(cls, key: bytes, data: bytes, name: str) -> StoredSnapshot:
        """Read the document of snapshot ``name``.

        Raises SnapshotError if it is damaged, of another store, or any number in it is wrong;
        NotSupported for another version.
        """
        line = HeadLine.decode(key, data, name)
        if len(data) != line.total:
            raise fault(name, f"it has {len(data)} bytes, expected {line.total}")
        view = memoryview(data)
        if keyed_digest(key, [view[:-DIGEST_SIZE]]) != view[-DIGEST_SIZE:]:
            raise fault(name, "it is damaged: its digest does not match")
        try:
            body = decompress(view[line.length : -DIGEST_SIZE], line.body_size)
        except ValueError as error:
            raise fault(name, f"its body is {error}") from error
        return _Body(line, body).snapshot()


class _Body:
    """The parts of a body, taken one after another, each checked before it is made."""

    def __init__(self, line: HeadLine, body: bytes) -> None:
        self._line = line
        self._name = line.head.name
        self._data = memoryview(body)
        self._at = 0
        self._file_pages = -(-line.head.size // PAGE)

    def snapshot(self) -> StoredSnapshot:
        counts = _COUNTS.unpack(self._take(_COUNTS.size))
        npacks, nextents, nruns, nfills, ncompanions, zero, extent_bytes, seal, companions = counts
        if zero or npacks != self._line.packs:
            raise fault(self._name, "its counts are wrong")
        names = bytes(self._take(npacks * DIGEST_SIZE))
        packs = tuple(names[k : k + DIGEST_SIZE] for k in range(0, len(names), DIGEST_SIZE))
        if len(set(packs)) != npacks:
            raise fault(self._name, "it lists a pack twice")
        runs = self._runs(nruns, npacks)
        fill_firsts, fill_counts = self._places(nfills, "same-filled runs")
        fills = FillRuns(fill_firsts, fill_counts, self._numbers("Q", nfills))
        offsets, lengths = self._numbers("Q", nextents), self._numbers("Q", nextents)
        suffix_lengths = self._numbers("H", ncompanions)
        content_lengths = self._numbers("I", ncompanions)
        if sum(lengths) != extent_bytes:
            raise fault(self._name, "its extents have another length than it says")
        if sum(suffix_lengths) + sum(content_lengths) != companions:
            raise fault(self._name, "its companions have another length than it says")
        found = StoredSnapshot(
            self._line.head,
            packs,
            self._extents(offsets, lengths),
            runs,
            fills,
            bytes(self._take(seal)),
            self._companions(suffix_lengths, content_lengths),
        )
        if self._at != len(self._data):
            raise fault(self._name, f"{len(self._data) - self._at} bytes follow its body")
        return found

    def _take(self, length: int) -> memoryview:
        if length > len(self._data) - self._at:
            raise fault(self._name, "its body is too short for what it lists")
        self._at += length
        return self._data[self._at - length : self._at]

    def _numbers(self, code: str, count: int) -> Numbers:
        return from_bytes(code, self._take(count * array(code).itemsize))

    def _places(self, count: int, what: str) -> tuple[Numbers, Numbers]:
        """Return the first pages and the lengths of runs."""
        gaps, counts = self._numbers("Q", count), self._numbers("I", count)
        if count and min(counts) == 0:
            raise fault(self._name, f"one of its {what} is empty")
        if sum(gaps) + sum(counts) > self._file_pages:
            raise fault(self._name, f"its {what} have more pages than the file")
        return array("Q", accumulate(map(add, gaps, chain((0,), counts)))), counts

    def _runs(self, count: int, npacks: int) -> PageRuns:
        firsts, counts = self._places(count, "page runs")
        packs, steps = self._numbers("I", count), self._numbers("I", count)
        sums = accumulate(map(add, steps, chain((0,), counts)))
        pages = array("I", (page & _MASK for page in sums))
        if count and (max(packs) >= npacks or max(map(add, pages, counts)) > PAGES_MAX):
            raise fault(self._name, "a page run is not in one of its packs")
        return PageRuns(firsts, counts, packs, pages)

    def _extents(self, offsets: Sequence[int], lengths: Sequence[int]) -> tuple[Extent, ...]:
        extents, end = [], 0
        for offset, length in zip(offsets, lengths, strict=True):
            if length == 0 or offset < end or offset + length > self._line.head.size:
                raise fault(self._name, f"its extent at {offset:#x} is out of place")
            end = offset + length
            extents.append(Extent(offset, bytes(self._take(length))))
        return tuple(extents)

    def _companions(self, suffixes: Sequence[int], contents: Sequence[int]) -> dict[str, bytes]:
        names = [bytes(self._take(length)).decode("ascii", "replace") for length in suffixes]
        if len(set(names)) != len(names) or not set(names) <= set(COMPANION_SUFFIXES):
            raise fault(self._name, f"its companions are not among {', '.join(COMPANION_SUFFIXES)}")
        return {
            name: bytes(self._take(length)) for name, length in zip(names, contents, strict=True)
        }


def _gaps(firsts: Numbers, counts: Numbers) -> Numbers:
    ends = chain((0,), map(add, firsts, counts))
    return array("Q", (first - end for first, end in zip(firsts, ends, strict=False)))
