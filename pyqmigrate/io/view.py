"""Snapshots that are not plain files, read as plain files: those of a store, and compact files.

``STORE#NAME`` names a snapshot of a store, which is a directory or the URL of an object store; a file
that has exactly this name is that file. A compact file has its own path. Both are opened through a
:class:`View`, a directory of this process alone in which the snapshot is a plain file::

    view = open_view("/backups/store#monday", ViewOptions())
    os.open(view.path, os.O_RDONLY)          # the mapped-ram file; its seal is beside it
    view.close()

The module that makes views is above this one (:mod:`pyqmigrate.mount.view`), and is looked up by its
name when a view is needed: the rest of the package opens files, and does not know of stores.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.io.place import absolute

__all__ = [
    "BASE_INSTEAD",
    "SharedView",
    "View",
    "ViewOptions",
    "is_compact",
    "is_store",
    "names_stored",
    "open_compact",
    "open_view",
    "refuse_stored",
]

BASE_INSTEAD = (
    "make a file of it (pyqmigrate store get), or save a whole snapshot and add it to the store, which "
    "keeps only what is new"
)
_MAKER = "pyqmigrate.mount.view"
_URL = r"[a-z][a-z0-9+.-]*://"
_STORE = "store.json"  # pyqmigrate.format.store: a module that a plain file does not need
ZSTD = bytes.fromhex("28b52ffd")
_SEEKABLE = bytes.fromhex("b1ea928f")  # at the end of a file in Zstandard's seekable form


class ViewOptions(NamedTuple):
    """How a view is made.

    ``cache`` is the directory of packs of a remote store, None for the default one. ``record``: what is
    read of the file is noted. Without ``pages``, those of a snapshot of a store need not be there.
    """

    cache: Path | None = None
    record: bool = False
    pages: bool = True


class View(Protocol):
    """A directory with one snapshot as a plain file. All methods may be called by several threads.

    ``path`` is the file's absolute path, and what belongs to it is beside it (``.seal``,
    ``.vm.json``, ``.workingset``). The path is valid in this process only, and until :meth:`close`;
    descriptors of the file stay valid after that.
    """

    path: Path

    @property
    def pushes(self) -> bool:
        """Whether :meth:`push` reads ahead, and :meth:`requests` has what was read."""
        ...

    def push(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have ranges of the file, each an offset and a length, read ahead in this order. Does not wait.

        Raises TargetError.
        """
        ...

    def fetch_rest(self) -> None:
        """Have all of the file fetched from a remote store, after what is pushed. Does not wait.

        Raises TargetError.
        """
        ...

    def requests(self) -> Sequence[tuple[int, int]]:
        """Return the offset and the length of each read of the file, in order, if ``record`` is on."""
        ...

    def messages(self) -> Sequence[str]:
        """Return what went wrong so far, the oldest first: damaged packs, a store that does not answer.
        Raises nothing."""
        ...

    def check_recordable(self) -> str:
        """Return where :meth:`write_working_set` writes. Raises UsageError or TargetError if it
        cannot."""
        ...

    def write_working_set(self, content: bytes) -> None:
        """Keep a working set for later restores. Raises TargetError."""
        ...

    def close(self) -> None:
        """Release it. Idempotent."""
        ...


class _Entry:
    """A view that is open in this process, and how many use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.view: View | None = None
        self.users = 0


_entries: dict[tuple[str, str | None, ViewOptions], _Entry] = {}
_entries_lock = threading.Lock()


class SharedView:
    """One use of a view, which several may use at the same time; the last :meth:`close` closes it."""

    def __init__(self, key: tuple[str, str | None, ViewOptions]) -> None:
        """Open the view of ``key``, unless it is open. Raises what the maker of views raises."""
        self._key = key
        with _entries_lock:
            self._entry = _entries.setdefault(key, _Entry())
            self._entry.users += 1
        self._open = True
        try:
            with self._entry.lock:
                if self._entry.view is None:
                    self._entry.view = _make(*key)
                self.view = self._entry.view
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The absolute path of the file."""
        return self.view.path

    @property
    def stored(self) -> bool:
        """Whether it is of a snapshot of a store, not of a compact file."""
        return self._key[1] is not None

    def explain(self, error: TargetError) -> TargetError:
        """Return an error of the system with the reason, if the view knows one: the kernel only says
        that a read failed."""
        messages = self.view.messages() if error.errno == errno.EIO else ()
        if messages:
            error.add_note(f"{messages[-1]}: ")
        return error

    def share(self) -> SharedView:
        """Return another use of the same view."""
        return SharedView(self._key)

    def close(self) -> None:
        """End this use. Idempotent."""
        with _entries_lock:
            if not self._open:
                return
            self._open = False
            self._entry.users -= 1
            if self._entry.users:
                return
            del _entries[self._key]
        if self._entry.view is not None:
            self._entry.view.close()


def _make(place: str, name: str | None, options: ViewOptions) -> View:
    maker: Any = importlib.import_module(_MAKER)
    view: View = maker.make_view(place, name, options)
    return view


def is_store(text: str) -> bool:
    """Return whether ``text`` is a URL, or a directory with a store."""
    return re.match(_URL, text) is not None or os.path.lexists(os.path.join(text, _STORE))


def names_stored(name: str) -> bool:
    """Return whether ``name`` is a snapshot of a store: no file has this name, and the text before the
    last ``#`` is a store."""
    store, separator, stored = name.rpartition("#")
    return bool(separator and store and stored) and not os.path.lexists(name) and is_store(store)


def open_view(name: str, options: ViewOptions) -> SharedView | None:
    """Open the snapshot ``STORE#NAME``; None if the text before the last ``#`` is not a store.

    Raises TargetError if the store or the snapshot cannot be read, SnapshotError if it is damaged,
    NotSupported without the libraries for it, UsageError for a name that no snapshot has.
    """
    store, separator, stored = name.rpartition("#")
    if not (separator and store and stored and is_store(store)):
        return None
    place = store if re.match(_URL, store) else os.fspath(absolute(store))
    return SharedView((place, stored, options))


def is_compact(read: Callable[[int, int], bytes], size: int) -> bool:
    """Return whether a file of ``size`` bytes is a compact one. ``read`` returns bytes of it, by offset
    and length."""
    if read(0, len(ZSTD)) != ZSTD:
        return False
    return read(max(size - len(_SEEKABLE), 0), len(_SEEKABLE)) == _SEEKABLE


def open_compact(path: Path, options: ViewOptions) -> SharedView:
    """Open the compact file at an absolute path. Raises as :func:`open_view`."""
    return SharedView((os.fspath(path), None, options))


def refuse_stored(name: str, what: str, instead: str) -> None:
    """Raise UsageError if ``name`` is a snapshot of a store, which never changes: it cannot ``what``,
    and the user can do ``instead``."""
    if "#" in name and names_stored(name):
        raise UsageError(f"{name!r} is a snapshot of a store, and cannot {what}: {instead}")
