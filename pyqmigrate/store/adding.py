"""Add a snapshot of any kind to a store.

    with Store.open("/srv/store") as store:
        report = add(store, "/snap/monday.mapped", "monday")

Two threads read, digest and compress; the thread that calls looks up the pages in the order of the file,
so that new pages get into frames in that order. Packs are written and durable before the snapshot is.
Where the file and its parent have seals, pieces of the same digest are not read: their pages are those
of the parent; so are pieces of an increment's sealed base in which no page has changed. Memory is
bounded, except for the digests of pages (24 to 32 bytes each) and the index.
"""

from __future__ import annotations

import contextlib
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.errors import SnapshotError, TargetError, UsageError
from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm, digester, zero_digest
from pyqmigrate.format.seal import PIECE, SEALED_MAX, SealHead, SealLine
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.format.store.keys import check_name, snapshot_key
from pyqmigrate.format.store.numbers import Numbers
from pyqmigrate.format.store.snapshot import BODY_MAX, Extent, FillRuns, PageRuns, StoredSnapshot
from pyqmigrate.format.store.snapshot_head import Counts, SnapshotHead, check_labels
from pyqmigrate.integrity.manifest import Manifest
from pyqmigrate.io.job import Progress
from pyqmigrate.io.target import Descriptors, Target, target_path
from pyqmigrate.log import logger
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.store.known_packs import KnownPacks
from pyqmigrate.store.locks import adding
from pyqmigrate.store.new_pages import NewPages
from pyqmigrate.store.pack_writer import FrameMaker, PackWriter
from pyqmigrate.store.parents import Parent, choose_parent
from pyqmigrate.store.place import Place
from pyqmigrate.store.plain_snapshot import RECORD_SUFFIX, PlainSnapshot, open_plain
from pyqmigrate.store.reporting import Reporter
from pyqmigrate.store.shown_file import CHUNK, Chunk, ShownFile, Span
from pyqmigrate.store.store import Store

__all__ = ["AddReport", "add"]

_THREADS = 2
_AHEAD = 4  # chunks that are read ahead
_CHUNK_PAGES = CHUNK // PAGE
_EXTENTS_MAX = BODY_MAX // 2  # bytes


@dataclass(frozen=True)
class AddReport:
    """What was added. ``size`` is that of the shown file, ``bytes_read`` of it, in bytes.

    ``pages`` are stored, ``same_pages`` repeat one word; ``new_pages`` were in no pack before, for
    which ``new_packs`` packs were written, ``new_bytes`` altogether; ``snapshot_bytes`` is the size of
    the snapshot's own document. ``parent`` is what it was compared with, ``source`` what kind of
    snapshot it was; ``sealed``: its seal was used. ``data_bytes`` are the guest's pages with data.
    """

    name: str
    source: str
    parent: str | None
    size: int
    data_bytes: int
    bytes_read: int
    pages: int
    same_pages: int
    new_pages: int
    new_packs: int
    new_bytes: int
    snapshot_bytes: int
    sealed: bool
    seconds: float


def add(
    store: Store,
    snapshot: Snapshot | Target,
    name: str | None = None,
    *,
    parent: str | None = "auto",
    labels: Mapping[str, str] | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> AddReport:
    """Add a snapshot of any kind under ``name``, and wait until that is durable.

    snapshot: an open snapshot, which stays open, or a target as for ``open_snapshot``.
    name: None for the name of its file.
    parent: the stored snapshot to compare with; ``auto`` for the one that shares the most, None for
        none. Its pages are found without it as well; it makes what is read and stored less.
    labels: texts to store with it.
    progress: called with the progress now and then, in bytes of the file.

    Raises UsageError for a name that is invalid or in use, a bad parent and bad labels; SnapshotError
    for a file that is damaged, also if it differs from its seal; NotSupported; TargetError (errno EBUSY
    if the file is changed while it is read, or if a gc of the store does not end). Packs that were
    written before a failure stay for a later add, until a gc.
    """
    check_callback("progress", progress)
    check("parent", parent, str, type(None))
    chosen_labels = check_labels(labels or {})
    chosen = check_name(_default_name(snapshot) if name is None else name)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(adding(store.place))
        _refuse_existing(place, chosen)
        plain, manifest, chosen_parent = open_plain(
            snapshot,
            store.place.directory,
            stack,
            lambda guest: choose_parent(store, guest, parent),
        )
        work = _Addition(store, place, plain, manifest, chosen_parent, progress)
        stack.callback(work.close)
        return work.run(chosen, chosen_labels, started)


def _default_name(snapshot: Snapshot | Target) -> str:
    if isinstance(snapshot, Snapshot):
        if snapshot.source.place is not None:
            return snapshot.source.place.name
    elif not isinstance(snapshot, Descriptors):
        return os.path.basename(target_path(snapshot))
    raise UsageError("give name: the snapshot has no path to take it from")


def _refuse_existing(place: Place, name: str) -> None:
    if place.find(snapshot_key(name)) is not None:
        raise UsageError(f"{place.name} has a snapshot {name!r} already: give another name")


class _Addition:
    """One snapshot that is being added. The methods are for one thread."""

    def __init__(
        self,
        store: Store,
        place: Place,
        plain: PlainSnapshot,
        manifest: Manifest | None,
        parent: Parent | None,
        progress: Callable[[Progress], object] | None,
    ) -> None:
        self._store, self._place, self._plain = store, place, plain
        self._file = ShownFile(plain.file, store.config.key, plain.pages, plain.snapshot)
        if self._file.size > SEALED_MAX:
            raise UsageError(f"a file of {self._file.size} bytes; {SEALED_MAX} are possible")
        self._record = plain.record()
        self._manifest = manifest
        self._algorithm = Algorithm.XXH3_128
        if self._manifest is not None:
            self._algorithm = self._manifest.algorithm
        self._digest = digester(self._algorithm)
        self._parent = parent
        packs = () if self._parent is None else self._parent.snapshot.packs
        room = self._file.data_pages + _CHUNK_PAGES  # a lookup wants room for a whole chunk
        self._known = KnownPacks(store, packs, room)
        self._threads = ThreadPoolExecutor(_THREADS, "pyqmigrate-add")
        self._writer = PackWriter(place, store.config, len(self._known.pages))
        # A parent that lacks a pack is not relied on; frames of it may be in memory still.
        self._whole = None if parent is None or not parent.number(self._known.ranges()) else parent
        self._same = self._same_pieces()
        self._new = NewPages(
            self._known.pages,
            FrameMaker(store.config, self._whole),
            self._writer,
            self._threads,
            frame_pages=store.config.frame_pages,
            most=_CHUNK_PAGES,
        )
        self._reporter = Reporter(progress, self._file.size)
        self._reads: deque[tuple[Span, Future[Chunk] | None]] = deque()
        self._runs, self._fills = array("Q"), array("Q")
        self._extents: list[Extent] = []
        self._extent_bytes = 0
        self._digests = bytearray()
        self._bytes_read = 0

    def close(self) -> None:
        """End the threads, and release the memory. Idempotent."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._writer.abandon()
        self._known.pages.close()

    def _same_pieces(self) -> bytes | None:
        """Return which pieces are those of the parent, so that they need not be read."""
        if self._whole is None:
            return None
        if self._plain.pages is not None:
            return self._plain.unchanged
        return self._whole.same_pieces(self._plain.guest(self._manifest))

    def run(self, name: str, labels: dict[str, str], started: float) -> AddReport:
        for span in self._file.spans(self._same):
            reading = None
            if not (span.same or span.hole):
                reading = self._threads.submit(self._file.read, span, self._digest)
            self._reads.append((span, reading))
            while len(self._reads) > _AHEAD:
                self._take(*self._reads.popleft())
        while self._reads:
            self._take(*self._reads.popleft())
        self._new.finish()
        self._plain.check_unchanged()
        return self._publish(name, labels, started)

    def _take(self, span: Span, reading: Future[Chunk] | None) -> None:
        """Take the next bytes of the file."""
        if reading is not None:
            self._take_chunk(reading.result())
        elif span.hole:
            self._add_digests(span, self._zero_digests(span))
        else:
            assert self._whole is not None
            _extend(self._runs, self._whole.runs(span.start, span.end), 1)
            _extend(self._fills, self._whole.fills(span.start, span.end), 0)
            self._add_extents(self._whole.extents(span.start, span.end))
            first, end = span.start // PIECE, -(-span.end // PIECE)
            self._digests += self._whole.digests(first, end)
        read = span.end - span.start if reading is not None else 0
        self._bytes_read += read
        self._reporter.add(span.end - span.start, read)

    def _take_chunk(self, chunk: Chunk) -> None:
        self._add_digests(Span(chunk.start, chunk.end), chunk.digests)
        self._add_extents(chunk.extents)
        for part in chunk.pages:
            found = self._new.find(part.data, part.first, part.examined)
            _extend(self._runs, found.runs, 1)
            _extend(self._fills, found.fills, 0)
        self._file.release(chunk)

    def _add_extents(self, extents: list[Extent]) -> None:
        self._extent_bytes += sum(len(extent.data) for extent in extents)
        if self._extent_bytes > _EXTENTS_MAX:
            raise UsageError(
                f"{self._plain.file.source.name!r} has more than {_EXTENTS_MAX >> 20} MiB that are not "
                "pages of RAM: it cannot be stored"
            )
        self._extents += extents

    def _zero_digests(self, span: Span) -> bytes:
        whole, rest = divmod(span.end - span.start, PIECE)
        return zero_digest(self._algorithm, PIECE) * whole + (
            zero_digest(self._algorithm, rest) if rest else b""
        )

    def _add_digests(self, span: Span, digests: bytes) -> None:
        """Add the digests of pieces; those of the seal must be the same."""
        if self._manifest is not None:
            at = span.start // PIECE * DIGEST_SIZE
            expected = self._manifest.digests[at : at + len(digests)]
            if digests != expected:
                number = next(
                    k
                    for k in range(0, len(digests), DIGEST_SIZE)
                    if digests[k : k + DIGEST_SIZE] != expected[k : k + DIGEST_SIZE]
                )
                raise SnapshotError(
                    "the file is damaged: a piece of 1 MiB differs from its seal (pyqmigrate verify "
                    "names what is damaged)",
                    offset=span.start + number // DIGEST_SIZE * PIECE,
                )
        self._digests += digests

    def _publish(self, name: str, labels: dict[str, str], started: float) -> AddReport:
        """Write the snapshot's document, and return the report."""
        runs, packs = self._placed()
        counts = Counts(
            sum(runs.counts), sum(self._fills[1::3]), len(self._new), self._writer.bytes_written
        )
        parent = None if self._parent is None else self._parent.name
        stream = self._plain.file.stream
        head = SnapshotHead(
            name,
            self._file.size,
            self._plain.mtime_ns,
            self._plain.file.machine,
            stream.uuid,
            time.time_ns(),
            parent,
            self._plain.source,
            labels,
            self._plain.blocks,
            counts,
        )
        seal = self._seal()
        document = StoredSnapshot(
            head,
            packs,
            tuple(self._extents),
            runs,
            FillRuns(self._fills[0::3], array("I", self._fills[1::3]), self._fills[2::3]),
            seal,
            {} if self._record is None else {RECORD_SUFFIX: self._record},
        )
        data = document.encode(self._store.config.key)
        if not self._place.write_new(snapshot_key(name), data):
            raise UsageError(
                f"{self._place.name} has a snapshot {name!r} already: give another name"
            )
        self._copy_working_set(name, seal)
        return AddReport(
            name,
            self._plain.source,
            parent,
            self._file.size,
            self._file.data_bytes,
            self._bytes_read,
            counts.pages,
            counts.same_pages,
            counts.new_pages,
            len(self._writer.packs),
            counts.new_bytes,
            len(data),
            self._manifest is not None,
            time.monotonic() - started,
        )

    def _placed(self) -> tuple[PageRuns, tuple[bytes, ...]]:
        """Return the runs by pack, and the packs that the snapshot needs."""
        known = self._known
        starts: Numbers = known.pages.starts + self._writer.starts[1:]
        placed = known.pages.place(self._runs, starts)
        all_packs = [*known.packs, *self._writer.packs]
        used = sorted(set(placed.packs))
        numbers = {pack: number for number, pack in enumerate(used)}
        packs = [all_packs[pack] for pack in used]
        needed = dict.fromkeys(packs)
        for pack in packs:
            for bases in (known.base_packs, self._writer.base_packs):
                needed.update(dict.fromkeys(sorted(bases.get(pack, ()))))
        runs = PageRuns(
            placed.firsts,
            placed.counts,
            array("I", map(numbers.__getitem__, placed.packs)),
            placed.pages,
        )
        return runs, tuple(needed)

    def _seal(self) -> bytes:
        manifest = self._manifest
        if manifest is None:
            file = self._plain.file
            head = SealHead(
                self._algorithm,
                self._file.size,
                self._plain.mtime_ns,
                clear_pages_zero=True,
                offset=file.offset,
                blocks=file.layouts,
                bitmap_order=file.bitmap_order,
            )
            manifest = Manifest(head, self._digests)
        return manifest.head.encode(manifest.digests) + manifest.digests

    def _copy_working_set(self, name: str, seal: bytes) -> None:
        line, newline, _ = seal.partition(b"\n")
        digest = SealLine.decode(line + newline).digest
        identity = SnapshotId(self._file.size, self._plain.mtime_ns, digest)
        found = self._plain.working_set(identity)
        if found is None:
            return
        try:
            self._store.write_working_set(name, found)
        except TargetError as error:  # the snapshot is complete without it
            logger.warning("the working set of %r is not stored: %s", name, error)


def _extend(runs: Numbers, more: Numbers, step: int) -> None:
    """Add runs, three numbers each; one that continues the last becomes part of it. ``step`` is by how
    much the number grows from page to page."""
    if runs and more:
        follows = runs[-3] + runs[-2] == more[0] and runs[-1] + step * runs[-2] == more[2]
        if follows:
            runs[-2] += more[1]
            more = more[3:]
    runs.extend(more)
