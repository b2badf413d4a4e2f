"""Files that are opened when they are first needed.

A worker that follows another one serves at once, also while the store does not answer: reads wait, and
what needs no store, such as the end of a reader, does not. Otherwise a mount whose last reader was
killed during an outage would stay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.mount.files import OpenFiles, ShownFiles
from pyqmigrate.mount.patience import patiently

__all__ = ["LateFiles"]


class LateFiles:
    """The files of ``open_files``, a :class:`~pyqmigrate.mount.files.ShownFiles`; all methods wait for a
    store that does not answer."""

    def __init__(self, open_files: OpenFiles) -> None:
        self._open_files = open_files
        self._files: ShownFiles | None = None
        self._lock = threading.Lock()
        self._count: Callable[[bool], object] | None = None

    @property
    def readers(self) -> int:
        return self._opened().readers

    def names(self) -> Iterator[str]:
        return self._opened().names()

    def identity(self, name: str) -> str | None:
        return self._opened().identity(name)

    def open(self, name: str) -> PlainFile:
        return self._opened().open(name)

    def fetch_rest(self) -> None:
        self._opened().fetch_rest()

    def on_request(self, count: Callable[[bool], object]) -> None:
        self._count = count  # before anything is opened

    def close(self) -> None:
        if self._files is not None:
            self._files.close()

    def _opened(self) -> ShownFiles:
        with self._lock:
            if self._files is None:
                self._files = patiently(self._open_files)
                if self._count is not None:
                    self._files.on_request(self._count)
            return self._files
