"""A store of snapshots: open it, list it, and open what is in it.

    with Store.open("/srv/store") as store:
        for entry in store.list():
            print(entry.name, entry.head.size)
        with store.open_file("monday") as file:
            head = file.read(0, 4096)

docs/internals/store-format.md describes what is in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pyqmigrate.errors import NotSupported, SnapshotError, TargetError, UsageError
from pyqmigrate.format.store.config import CONFIG_MAX, StoreConfig
from pyqmigrate.format.store.keys import (
    CONFIG_KEY,
    SNAPSHOTS,
    name_of_snapshot,
    snapshot_key,
    working_set_key,
)
from pyqmigrate.format.store.snapshot import StoredSnapshot
from pyqmigrate.format.store.snapshot_head import BODY_MAX, HEAD_MAX, HeadLine, SnapshotHead
from pyqmigrate.format.working_set import RUNS_MAX, SUFFIX
from pyqmigrate.store.frames import Frames
from pyqmigrate.store.holding import hold_snapshot
from pyqmigrate.store.leases import Leases
from pyqmigrate.store.pack_cache import DEFAULT_LIMIT, PackCache
from pyqmigrate.store.packs import Packs
from pyqmigrate.store.place import Place, open_place, read_at_most
from pyqmigrate.store.stored_file import StoredFile

__all__ = ["NoSnapshot", "SnapshotEntry", "Store"]

T = TypeVar("T")
R = TypeVar("R")

_DOCUMENT_MAX = HEAD_MAX + BODY_MAX + 16
_WORKING_SET_MAX = HEAD_MAX + 16 * RUNS_MAX
_HEAD_GUESS = 16 << 10  # bytes: nearly every head
_REMOTE_READERS = 16  # of heads, at once


class NoSnapshot(UsageError):
    """There is no snapshot of this name in the store."""


@dataclass(frozen=True)
class SnapshotEntry:
    """A stored snapshot in a list. ``stored_bytes`` is the size of its document; ``head`` is None, and
    ``error`` says why, if that is damaged."""

    name: str
    stored_bytes: int
    head: SnapshotHead | None
    packs: int = 0
    error: str | None = None


class Store:
    """An open store; all methods may be called by several threads at once.

    ``place`` is where its objects are, ``config`` its ``store.json``. It is closed with
    :meth:`close`, or by a ``with`` block; files that it opened are not read after that. A process that
    was forked must open it again.
    """

    def __init__(
        self,
        place: Place,
        config: StoreConfig,
        cache: PackCache | None = None,
        *,
        patience: float = 0.0,
    ) -> None:
        self.place = place
        self.config = config
        self.packs = Packs(place, config, cache, patience=patience)
        self.frames = Frames(self.packs)
        self._leases = None if place.directory is not None else Leases(place)

    @classmethod
    def create(cls, target: str | os.PathLike[str]) -> Store:
        """Make a new store in a directory, which is created, or below a URL, and open it.

        Raises UsageError if there is anything else already, TargetError.
        """
        config = StoreConfig.new()
        with contextlib.ExitStack() as stack:
            place = open_place(os.fspath(target), create=True)
            stack.callback(place.close)
            found = next(iter(place.list("")), None)
            if found is not None:
                what = "a store is there already" if found.key == CONFIG_KEY else "it is not empty"
                raise UsageError(f"cannot create a store in {place.name}: {what}")
            if not place.write_new(CONFIG_KEY, config.encode()):
                raise UsageError(f"cannot create a store in {place.name}: a store is there already")
            stack.pop_all()
        return cls(place, config)

    @classmethod
    def open(
        cls,
        target: str | os.PathLike[str],
        *,
        cache: str | os.PathLike[str] | None = None,
        cache_limit: int = DEFAULT_LIMIT,
        patience: float = 0.0,
        early: Iterable[str] = (),
    ) -> Store:
        """Open the store in a directory or below a URL (see :func:`pyqmigrate.store.place.open_place`).

        cache: directory for parts of packs that were read, of remote stores only; other processes
            may use it, too. cache_limit: its size in bytes, about.
        patience: for how many seconds a read of a stored snapshot is repeated if the place does not
            answer; ``math.inf`` to wait for it.
        early: keys of objects that will be needed at once, which are requested together with the
            configuration, from a remote store.

        Raises UsageError if this is not a store, SnapshotError if its configuration is damaged,
        NotSupported for a version that is not known here, TargetError.
        """
        with contextlib.ExitStack() as stack:
            place = open_place(os.fspath(target))
            stack.callback(place.close)
            if place.directory is None and early:
                # A local store has no time for a module that it does not need.
                from pyqmigrate.store.early_reads import EarlyReads

                place = EarlyReads(place, (CONFIG_KEY, *early))
            try:
                data = read_at_most(place, CONFIG_KEY, CONFIG_MAX, "configuration")
            except TargetError as error:
                if error.errno != errno.ENOENT:
                    raise
                raise UsageError(
                    f"{place.name} is not a store of snapshots: it has no {CONFIG_KEY}; "
                    "pyqmigrate store create makes one"
                ) from error
            try:
                config = StoreConfig.decode(bytes(data))
            except (SnapshotError, NotSupported) as error:
                error.add_note(f"{place.name}: ")
                raise
            packs = None
            if cache is not None and place.directory is None:
                packs = PackCache(cache, cache_limit)
            stack.pop_all()
        return cls(place, config, packs, patience=patience)

    @property
    def name(self) -> str:
        """The store as messages name it, without credentials."""
        return self.place.name

    def names(self) -> list[str]:
        """Return the names of all snapshots, sorted. Files of other names are left out."""
        return [name for name, _ in self._documents()]

    def list(self, names: Iterable[str] | None = None) -> list[SnapshotEntry]:
        """Return all snapshots, or those of ``names``, by name. Damaged ones are listed, too."""
        wanted = None if names is None else set(names)
        found = [item for item in self._documents() if wanted is None or item[0] in wanted]
        listed = self.in_parallel(self._entry, found)
        return [entry for entry in listed if entry is not None]

    def head(self, name: str) -> SnapshotHead:
        """Return what a snapshot is, without its index. Raises as :meth:`read_snapshot`."""
        return self._line(name).head

    def read_snapshot(self, name: str) -> StoredSnapshot:
        """Return the whole document of a snapshot.

        Raises NoSnapshot if there is none of this name, SnapshotError if it is damaged, TargetError.
        """
        key = snapshot_key(name)
        with self._naming(name):
            data = read_at_most(self.place, key, _DOCUMENT_MAX, "snapshot")
        return StoredSnapshot.decode(self.config.key, bytes(data), name)

    def open_file(self, name: str) -> StoredFile:
        """Open a snapshot as the file that it shows; while it is open, :func:`remove` refuses it (of an
        object store: soon after it was opened, by a reader that may write). Raises as
        :meth:`read_snapshot`."""
        with contextlib.ExitStack() as stack:
            with self._naming(name):
                stack.callback(hold_snapshot(self.place, snapshot_key(name)))
            snapshot = self.read_snapshot(name)
            if self._leases is not None:
                stack.callback(self._leases.hold(name))
            release = stack.pop_all().close
        again = None if self.place.directory is None else lambda: self._hold_again(snapshot)
        return StoredFile(snapshot, self.frames, lambda: self._companions(name), release, again)

    def _hold_again(self, snapshot: StoredSnapshot) -> Callable[[], None] | None:
        """Keep an open snapshot of a local store from being removed; return None if it was, or another one
        has its name."""
        name = snapshot.head.name
        try:
            release = hold_snapshot(self.place, snapshot_key(name))
        except TargetError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        try:
            if self.head(name) == snapshot.head:
                return release
        except SnapshotError:
            pass
        except BaseException:
            release()
            raise
        release()
        return None

    def working_set(self, name: str) -> bytes | None:
        """Return the content of the file ``NAME.workingset``, None if there is none."""
        key = working_set_key(name)
        try:
            return bytes(read_at_most(self.place, key, _WORKING_SET_MAX, "working set"))
        except TargetError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def write_working_set(self, name: str, data: bytes) -> None:
        """Store the content of a file ``NAME.workingset``; an older one is replaced."""
        if len(data) > _WORKING_SET_MAX:
            raise UsageError(f"a working set has at most {_WORKING_SET_MAX} bytes")
        self.place.replace(working_set_key(name), data)

    def in_parallel(self, work: Callable[[T], R], items: Iterable[T]) -> Sequence[R]:
        """Return the results of ``work`` for each item, of a remote store by several threads."""
        if self.place.directory is not None:
            return [work(item) for item in items]
        with ThreadPoolExecutor(_REMOTE_READERS, "pyqmigrate-store") as pool:
            return list(pool.map(work, items))

    def close(self) -> None:
        """Close it. Idempotent."""
        if self._leases is not None:
            self._leases.close()
        self.frames.close()
        if self.packs.cache is not None:
            self.packs.cache.close()
        self.place.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _documents(self) -> Sequence[tuple[str, int]]:
        """Return the names of all snapshots and the sizes of their documents, sorted."""
        named = ((name_of_snapshot(e.key), e.size) for e in self.place.list(SNAPSHOTS))
        return sorted((name, size) for name, size in named if name is not None)

    def _entry(self, document: tuple[str, int]) -> SnapshotEntry | None:
        name, size = document
        try:
            line = self._line(name)
        except NoSnapshot:
            return None  # it was removed since it was listed
        except (SnapshotError, NotSupported) as error:
            return SnapshotEntry(name, size, None, error=str(error))
        return SnapshotEntry(name, size, line.head, line.packs)

    def _line(self, name: str) -> HeadLine:
        key = snapshot_key(name)
        with self._naming(name):
            data = bytes(self.place.read(key, 0, _HEAD_GUESS))
            if b"\n" not in data:
                data = bytes(self.place.read(key, 0, HEAD_MAX))
        return HeadLine.decode(self.config.key, data, name)

    def _companions(self, name: str) -> Mapping[str, bytes]:
        working_set = self.working_set(name)
        return {} if working_set is None else {SUFFIX: working_set}

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Make a UsageError of a missing object."""
        try:
            yield
        except TargetError as error:
            if error.errno != errno.ENOENT:
                raise
            raise NoSnapshot(f"there is no snapshot {name!r} in {self.name}") from error
