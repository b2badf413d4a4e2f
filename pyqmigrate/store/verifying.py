"""Verify a store: every pack, every page, and that every snapshot finds what it needs."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pyqmigrate.errors import NotSupported, SnapshotError, TargetError
from pyqmigrate.format.store.keyed import keyed_digest
from pyqmigrate.format.store.keys import PACKS, pack_key, pack_of_key
from pyqmigrate.format.store.pack import MAGIC, PACK_MAX, PackFooter
from pyqmigrate.format.store.snapshot import StoredSnapshot
from pyqmigrate.io.job import Progress
from pyqmigrate.store.damage import DamagedPack
from pyqmigrate.store.frames import Frames
from pyqmigrate.store.packs import Packs
from pyqmigrate.store.reporting import Reporter
from pyqmigrate.store.store import NoSnapshot, Store

__all__ = ["StoreDamage", "VerifyReport", "verify"]

# Of an object, not of the system: what the disk lost, what is missing, or is not a file.
_BAD = (
    errno.EIO,
    errno.ENOENT,
    errno.ELOOP,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EINVAL,
    errno.EBADMSG,
    errno.EUCLEAN,
)
_NAMED_MAX = 1000  # damages that are listed


@dataclass(frozen=True)
class StoreDamage:
    """One thing that is damaged, and the ``names`` of the snapshots that cannot be read whole for it.

    ``pack`` is the hexadecimal digest of a pack; ``frame`` and ``page`` are numbers in it, ``page``
    that of the first bad page. All three are None if the document of a snapshot is damaged.
    """

    why: str
    names: tuple[str, ...]
    pack: str | None = None
    frame: int | None = None
    page: int | None = None

    def __str__(self) -> str:
        where = [] if self.pack is None else [f"pack {self.pack}"]
        where += [] if self.frame is None else [f"frame {self.frame}"]
        where += [] if self.page is None else [f"page {self.page}"]
        names = ", ".join(self.names) or "no snapshot"
        return f"{', '.join(where)}{': ' if where else ''}{self.why} ({names})"


@dataclass(frozen=True)
class VerifyReport:
    """What was verified; ``packs`` are those that could be read, ``damages`` at most 1000 of
    ``damage_count``."""

    snapshot_count: int
    packs: int
    unneeded_packs: int
    bytes_read: int
    damages: tuple[StoreDamage, ...]
    damage_count: int
    seconds: float

    @property
    def intact(self) -> bool:
        return not self.damage_count


@dataclass(frozen=True)
class _Needs:
    """What a snapshot needs: packs, and of each one how many of its first pages."""

    packs: frozenset[bytes]
    pages: dict[bytes, int]


def verify(
    store: Store,
    names: Iterable[str] | None = None,
    *,
    channels: int = 4,
    progress: Callable[[Progress], object] | None = None,
) -> VerifyReport:
    """Verify all snapshots and all packs, or those that the snapshots ``names`` need.

    Every pack is read whole and compared with the digest in its name, every page is decompressed and
    compared with its own. ``channels`` are threads, each with a pack of 8 MiB at most. Raises
    NoSnapshot for a name that is not there, TargetError if the place cannot be read.
    """
    return _Verification(store, names, channels, progress).run()


class _Verification:
    def __init__(
        self,
        store: Store,
        names: Iterable[str] | None,
        channels: int,
        progress: Callable[[Progress], object] | None,
    ) -> None:
        self._store = store
        # What was read before, or is in a local cache, proves nothing.
        self._frames = Frames(Packs(store.place, store.config))
        self._all = names is None
        self._names = store.names() if names is None else list(dict.fromkeys(names))
        self._channels = max(1, channels)
        self._progress = progress
        self._began = time.monotonic()
        self._needs: dict[str, _Needs] = {}
        self._pages: dict[bytes, int] = {}  # of each pack whose footer is intact
        self._bases: dict[bytes, tuple[bytes, ...]] = {}
        self._documents: list[StoreDamage] = []
        self._bad: list[tuple[bytes, int | None, int | None, range | None, str]] = []
        self._lock = threading.Lock()
        self._read = 0
        self._packs_read = 0

    def run(self) -> VerifyReport:
        listed = {
            pack: entry.size
            for entry in self._store.place.list(PACKS)
            if (pack := pack_of_key(entry.key)) is not None
        }
        self._in_threads(self._look_into, self._names)
        needed = frozenset[bytes]().union(*(needs.packs for needs in self._needs.values()))
        packs = sorted(needed | listed.keys()) if self._all else sorted(needed)
        report = Reporter(self._progress, sum(listed.get(pack, 0) for pack in packs))

        def check(pack: bytes) -> None:
            self._check_pack(pack)
            report.add(listed.get(pack, 0))

        self._in_threads(check, packs)
        self._frames.close()
        damages = [*self._documents, *self._unresolved(), *self._named()]
        return VerifyReport(
            len(self._names),
            self._packs_read,
            len(listed.keys() - needed) if self._all else 0,
            self._read,
            tuple(damages[:_NAMED_MAX]),
            len(damages),
            time.monotonic() - self._began,
        )

    def _in_threads(self, work: Callable[..., None], items: Sequence[object]) -> None:
        with ThreadPoolExecutor(self._channels, "pyqmigrate-verify") as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _look_into(self, name: str) -> None:
        """Read the document of a snapshot, and note what it needs."""
        try:
            snapshot = self._store.read_snapshot(name)
        except NoSnapshot:
            if self._all:
                return  # it was removed since it was listed
            raise
        except (SnapshotError, NotSupported) as error:
            with self._lock:
                self._documents.append(StoreDamage(str(error), (name,)))
            return
        runs = snapshot.runs
        pages: dict[bytes, int] = {}
        for place, page, count in zip(runs.packs, runs.pages, runs.counts, strict=True):
            pack = snapshot.packs[place]
            if pages.get(pack, 0) < page + count:
                pages[pack] = page + count
        with self._lock:
            self._needs[name] = _Needs(frozenset(snapshot.packs), pages)

    def _check_pack(self, pack: bytes) -> None:
        try:
            data = memoryview(self._store.place.read(pack_key(pack), 0, PACK_MAX + 1))
        except TargetError as error:
            if error.errno not in _BAD:
                raise
            self._note(pack, f"it cannot be read: {error.strerror}")
            return
        with self._lock:
            self._read += len(data)
            self._packs_read += 1
        key = self._store.config.key
        intact = keyed_digest(key, [data]) == pack
        try:
            footer = PackFooter.decode(key, bytes(data), len(data), pack.hex())
        except SnapshotError as error:
            self._note(pack, str(error))
            return
        with self._lock:
            self._pages[pack] = len(footer)
            self._bases[pack] = footer.base_packs
        found = False
        for number in range(len(footer.lengths)):
            frame = footer.frame(number)
            try:
                self._frames.verify(pack, frame, data[frame.offset :][: frame.length])
            except DamagedPack as error:
                found = True
                pages = range(frame.first, frame.first + frame.npages)
                with self._lock:
                    self._bad.append(
                        (pack, number, _page_of(error, pack), pages, _why(error, pack))
                    )
        if not intact and not found:
            what = "its first bytes" if data[: len(MAGIC)] != MAGIC else "its bytes"
            self._note(pack, f"{what} are not those that its name was made of")

    def _note(self, pack: bytes, why: str) -> None:
        with self._lock:
            self._bad.append((pack, None, None, None, why))

    def _unresolved(self) -> list[StoreDamage]:
        """Return what snapshots need, and intact packs do not have."""
        found = []
        for name, needs in sorted(self._needs.items()):
            for pack, count in needs.pages.items():
                pages = self._pages.get(pack)
                if pages is not None and count > pages:
                    why = f"it has {pages} pages, and page {count - 1} is needed"
                    found.append(StoreDamage(why, (name,), pack.hex()))
            for pack in needs.packs:
                for base in self._bases.get(pack, ()):
                    if base not in needs.packs:
                        why = f"its base, pack {base.hex()}, is not listed by the snapshot"
                        found.append(StoreDamage(why, (name,), pack.hex()))
        return found

    def _named(self) -> list[StoreDamage]:
        """Return the damages of packs, with the snapshots that they hit."""
        documents: dict[str, StoredSnapshot | None] = {}
        found: list[StoreDamage] = []
        for pack, frame, page, pages, why in sorted(
            self._bad, key=lambda bad: (bad[0], bad[1] or 0)
        ):
            hit = []
            for name, needs in self._needs.items():
                if pack not in needs.packs:
                    continue
                if (
                    pages is None
                    or len(found) >= _NAMED_MAX
                    or self._uses(documents, name, pack, pages)
                ):
                    hit.append(name)
            found.append(StoreDamage(why, tuple(sorted(hit)), pack.hex(), frame, page))
        return found

    def _uses(
        self, documents: dict[str, StoredSnapshot | None], name: str, pack: bytes, pages: range
    ) -> bool:
        """Return whether a snapshot has pages of a frame; what is XORed with them is damaged itself."""
        if name not in documents:
            if len(documents) > 8:  # whole documents, which can be large
                documents.pop(next(iter(documents)))
            try:
                documents[name] = self._store.read_snapshot(name)
            except (NoSnapshot, SnapshotError):
                documents[name] = None
        snapshot = documents[name]
        if snapshot is None:
            return True
        place, runs = snapshot.packs.index(pack), snapshot.runs
        return any(
            number == place and first < pages.stop and first + count > pages.start
            for number, first, count in zip(runs.packs, runs.pages, runs.counts, strict=True)
        )


def _page_of(error: DamagedPack, pack: bytes) -> int | None:
    return error.page if error.pack == pack else None


def _why(error: DamagedPack, pack: bytes) -> str:
    return error.why if error.pack == pack else f"its base is damaged: {error.strerror}"
