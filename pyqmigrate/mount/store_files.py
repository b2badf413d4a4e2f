"""The snapshots of a store, as the files that a mount shows."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from pyqmigrate.errors import UsageError
from pyqmigrate.format.store.keys import WORKING_SETS, snapshot_key, working_set_key
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.mount.patience import patiently
from pyqmigrate.store.pack_cache import default_directory
from pyqmigrate.store.store import Store
from pyqmigrate.store.stored_file import StoredFile

__all__ = ["StoreFiles"]

_KNOWN_SECONDS = 1.0  # for so long it is not looked again which snapshot has a name
_REMOTE_READERS = 8


class StoreFiles:
    """The snapshots of the store ``place``, or those of ``names`` only: a
    :class:`~pyqmigrate.mount.files.ShownFiles`.

    cache: directory for the packs of a remote store, empty for the default one.

    A store that does not answer is asked again until it does, once it is open: a guest would not survive
    an error. Raises UsageError if the place is not a store, TargetError, SnapshotError, NotSupported.
    """

    def __init__(self, place: str, names: tuple[str, ...] | None, cache: str = "") -> None:
        self._names = names
        self._store = Store.open(
            place,
            cache=cache or default_directory(),
            patience=math.inf,
            early=_keys_of(names) if names is not None and len(names) == 1 else (),
        )
        self.readers = 2 if self._store.place.directory is not None else _REMOTE_READERS
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, str | None]] = {}
        self._open: weakref.WeakSet[StoredFile] = weakref.WeakSet()

    def names(self) -> Iterator[str]:
        """Yield the names and those of seals and working sets, from listings: no snapshot is read.

        So a record (NAME.vm.json) is not listed, but can be opened.
        """
        place = self._store.place
        others = {entry.key for entry in patiently(lambda: [*place.list(WORKING_SETS)])}
        for name in patiently(self._store.names):
            if self._names is None or name in self._names:
                yield name
                yield f"{name}.seal"
                if working_set_key(name) in others:
                    yield f"{name}.workingset"

    def identity(self, name: str) -> str | None:
        if self._names is not None and name not in self._names:
            return None
        with self._lock:
            until, found = self._known.get(name, (0.0, None))
            if time.monotonic() < until:
                return found
        found = patiently(lambda: self._identity(name))
        with self._lock:
            self._known[name] = time.monotonic() + _KNOWN_SECONDS, found
        return found

    def open(self, name: str) -> PlainFile:
        file = patiently(lambda: self._store.open_file(name))
        with self._lock:
            self._open.add(file)
        return file

    def fetch_rest(self) -> None:
        """Read all of the open snapshots of a remote store into the local cache; readers go first."""
        if self._store.packs.cache is None:
            return
        with self._lock:
            files = list(self._open)
        for file in files:
            file.prefetch(file.data_ranges(), decompress=False)

    def on_request(self, count: Callable[[bool], object]) -> None:
        if self._store.place.directory is None:
            self._store.packs.on_request = count

    def close(self) -> None:
        self._store.close()

    def _identity(self, name: str) -> str | None:
        try:
            head = self._store.head(name)
        except UsageError:
            return None
        return f"{head.size}:{head.mtime_ns}:{head.added_ns}"


def _keys_of(names: tuple[str, ...]) -> list[str]:
    """Return the keys of the objects that the snapshots ``names`` are opened with."""
    return [key(name) for name in names for key in (snapshot_key, working_set_key)]
