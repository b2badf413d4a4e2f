"""The parent of a snapshot that is added: an earlier one of the same guest, which it shares pages with."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add, le

from pyqmigrate.errors import NotSupported, PyqmigrateError, SnapshotError, UsageError
from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm, Data
from pyqmigrate.format.seal import SealLine
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.format.store.keys import SNAPSHOTS, name_of_snapshot
from pyqmigrate.format.store.numbers import Numbers
from pyqmigrate.format.store.pack import BasePage
from pyqmigrate.format.store.snapshot import Extent, StoredSnapshot
from pyqmigrate.format.store.snapshot_head import SnapshotHead
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.store.pack_writer import BasePages
from pyqmigrate.store.store import Store

__all__ = ["Guest", "Parent", "choose_parent"]

_HEADS = 32  # the newest snapshots, whose heads are read
_COMPARED = 4  # of these, whose seals are compared


@dataclass(frozen=True)
class Guest:
    """What a parent must have in common with the file that is added. ``digests`` are those of its
    seal, if it has one; ``base`` is the identity of an increment's base."""

    uuid: bytes | None
    machine: str
    blocks: tuple[BlockSpec, ...]
    size: int
    algorithm: Algorithm | None = None
    digests: bytes = b""
    base: SnapshotId | None = None

    def is_of(self, head: SnapshotHead) -> bool:
        """Return whether a stored snapshot is of the same guest, as far as both record it."""
        return (head.uuid, head.machine, head.blocks) == (self.uuid, self.machine, self.blocks)


class Parent(BasePages):
    """A stored snapshot to compare with. Methods may be called by several threads."""

    def __init__(self, store: Store, snapshot: StoredSnapshot) -> None:
        self._store = store
        self.snapshot = snapshot
        self.name = snapshot.head.name
        self._starts: Sequence[int] = ()

    def same_pieces(self, guest: Guest) -> bytes | None:
        """Return, for each piece of the guest's file, whether the parent's seal has the same digest.

        None if the two are not of the same guest, or cannot be compared.
        """
        if not guest.is_of(self.snapshot.head):
            return None
        return _same(self.snapshot, guest)

    def digests(self, first: int, end: int) -> bytes:
        """Return the digests of the pieces ``[first, end)`` from its seal."""
        digests = self.snapshot.seal.partition(b"\n")[2]
        return digests[first * DIGEST_SIZE : end * DIGEST_SIZE]

    def number(self, known: Mapping[bytes, tuple[int, int]]) -> bool:
        """Take the numbers ``(first, end)`` of the pages of packs; return whether all packs and pages of
        the snapshot are there."""
        try:
            packs = [known[pack] for pack in self.snapshot.packs]
        except KeyError:
            return False
        self._starts = [first for first, _ in packs]
        sizes = [end - first for first, end in packs]
        runs = self.snapshot.runs
        ends = map(add, runs.pages, runs.counts)
        return all(map(le, ends, map(sizes.__getitem__, runs.packs)))

    def runs(self, start: int, end: int) -> Numbers:
        """Return the runs of known pages in bytes ``[start, end)`` of the file: three numbers each."""
        runs = self.snapshot.runs
        low, high = _within(runs.firsts, runs.counts, start, end)
        packs = map(self._starts.__getitem__, runs.packs[low:high])
        numbers = array("Q", map(add, packs, runs.pages[low:high]))
        return _cut(runs.firsts[low:high], runs.counts[low:high], numbers, start, end, 1)

    def fills(self, start: int, end: int) -> Numbers:
        """Return the same-filled runs in bytes ``[start, end)``: three numbers each."""
        fills = self.snapshot.fills
        low, high = _within(fills.firsts, fills.counts, start, end)
        columns = fills.firsts[low:high], fills.counts[low:high], fills.words[low:high]
        return _cut(*columns, start, end, 0)

    def extents(self, start: int, end: int) -> list[Extent]:
        """Return the extents in bytes ``[start, end)``."""
        found = []
        for extent in self.snapshot.extents:
            low = max(extent.offset, start)
            high = min(extent.offset + len(extent.data), end)
            if low < high:
                found.append(Extent(low, extent.data[low - extent.offset : high - extent.offset]))
        return found

    def base(self, page: int) -> BasePage | None:
        runs = self.snapshot.runs
        run = bisect_right(runs.firsts, page) - 1
        if run < 0 or page >= runs.firsts[run] + runs.counts[run]:
            return None
        found = BasePage(
            self.snapshot.packs[runs.packs[run]], runs.pages[run] + page - runs.firsts[run]
        )
        footer = self._store.packs.footer(found.pack)
        try:
            frame = footer.frame_of(found.page)
        except IndexError:
            return None
        return footer.base(frame, found.page) if frame.xor else found

    def contents(self, bases: Sequence[BasePage | None]) -> Sequence[Data | None]:
        places: list[tuple[tuple[bytes, int], int] | None] = []
        for base in bases:
            if base is None:
                places.append(None)
                continue
            frame = self._store.packs.footer(base.pack).frame_of(base.page)
            places.append(((base.pack, frame.number), base.page - frame.first))
        frames = self._store.frames.load({place[0] for place in places if place is not None})
        return [
            None
            if place is None
            else memoryview(frames[place[0]])[place[1] * PAGE : (place[1] + 1) * PAGE]
            for place in places
        ]


def choose_parent(store: Store, guest: Guest, parent: str | None) -> Parent | None:
    """Return the parent: ``auto``, the name of a stored snapshot, or None for none.

    ``auto``: the base of an increment; else of the newest snapshots of the same guest (uuid, machine
    and RAM blocks) the one whose seal has the most pieces in common. A damaged snapshot is not chosen.
    Raises UsageError for a name that is not there or a snapshot with other RAM blocks, SnapshotError
    for a damaged one.
    """
    if parent is None:
        return None
    if parent != "auto":
        snapshot = store.read_snapshot(parent)
        if snapshot.head.blocks != guest.blocks:
            raise UsageError(f"{parent!r} cannot be the parent: it has other RAM blocks")
        return Parent(store, snapshot)
    best: tuple[int, StoredSnapshot] | None = None
    for head in _alike(store, guest)[:_COMPARED]:
        try:
            snapshot = store.read_snapshot(head.name)
        except (PyqmigrateError, OSError):
            continue
        if guest.base is not None and _is_base(head, guest.base):
            return Parent(store, snapshot)
        same = _same(snapshot, guest)
        score = 0 if same is None else sum(same)
        if best is None or score > best[0]:
            best = (score, snapshot)
    return None if best is None else Parent(store, best[1])


def _alike(store: Store, guest: Guest) -> list[SnapshotHead]:
    """Return the newest snapshots of the guest, an increment's base first."""
    entries = sorted(store.place.list(SNAPSHOTS), key=lambda entry: entry.mtime, reverse=True)
    names = filter(None, (name_of_snapshot(entry.key) for entry in entries))
    newest = [name for name, _ in zip(names, range(_HEADS), strict=False)]
    base = guest.base
    heads = [entry.head for entry in store.list(newest)]
    found = [head for head in heads if head is not None and guest.is_of(head)]
    found.sort(
        key=lambda head: (base is not None and _is_base(head, base), head.added_ns), reverse=True
    )
    return found


def _is_base(head: SnapshotHead, base: SnapshotId) -> bool:
    return (head.size, head.mtime_ns) == (base.size, base.mtime_ns)


def _same(snapshot: StoredSnapshot, guest: Guest) -> bytes | None:
    """Return which pieces have the same digests in both seals; None if these cannot be compared."""
    line, newline, theirs = snapshot.seal.partition(b"\n")
    if guest.algorithm is None or not newline:
        return None
    try:
        seal = SealLine.decode(line + newline)
        seal.check([theirs])
    except (SnapshotError, NotSupported):
        return None
    head = seal.head
    if (head.algorithm, head.size) != (guest.algorithm, guest.size):
        return None
    ours = guest.digests
    if len(theirs) != len(ours) or snapshot.head.size != guest.size:
        return None
    return bytes(
        ours[at : at + DIGEST_SIZE] == theirs[at : at + DIGEST_SIZE]
        for at in range(0, len(ours), DIGEST_SIZE)
    )


def _within(firsts: Numbers, counts: Numbers, start: int, end: int) -> tuple[int, int]:
    """Return which runs have pages in bytes ``[start, end)``: ``[low, high)``."""
    first, last = start // PAGE, -(-end // PAGE)
    low = bisect_right(firsts, first) - 1
    if low < 0 or firsts[low] + counts[low] <= first:
        low += 1
    return low, max(bisect_left(firsts, last), low)


def _cut(
    firsts: Numbers, counts: Numbers, numbers: Numbers, start: int, end: int, step: int
) -> Numbers:
    """Return runs as three numbers each, without the pages outside of ``[start, end)``; ``step`` is by
    how much the number grows from page to page."""
    runs = array("Q", bytes(24 * len(firsts)))
    runs[0::3], runs[1::3], runs[2::3] = firsts, array("Q", counts), numbers
    if runs:
        first, last = start // PAGE, -(-end // PAGE)
        before = max(first - runs[0], 0)
        runs[0] += before
        runs[1] -= before
        runs[2] += step * before
        runs[-2] = min(runs[-2], last - runs[-3])
    return runs
