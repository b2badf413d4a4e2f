"""The files that a mount shows, and where they come from.

A worker opens them from a text, the *place*: a store, a compact file, or a plain file. It is opened
again in each worker, so nothing of it is shared.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

from pyqmigrate.errors import target_error
from pyqmigrate.io.plain_file import Bytes, LocalPlainFile, PlainFile
from pyqmigrate.io.view import is_compact

__all__ = [
    "COMPANIONS",
    "BytesFile",
    "OpenFiles",
    "ShownFiles",
    "SingleFile",
    "import_readers",
    "open_files",
    "reader_modules",
]

COMPANIONS = (".seal", ".vm.json", ".workingset")  # suffixes of the files beside a snapshot


class ShownFiles(Protocol):
    """Named files, all in one directory. Several threads call the methods at once.

    They raise TargetError if the place of the files cannot be reached. ``readers`` is how many threads
    read ahead at once.
    """

    @property
    def readers(self) -> int: ...

    def names(self) -> Iterator[str]:
        """Yield the names in the directory, those of companions included."""
        ...

    def identity(self, name: str) -> str | None:
        """Return a text that differs if another file has this name now; None if no file has it.

        Companions have none: they belong to their file.
        """
        ...

    def open(self, name: str) -> PlainFile:
        """Open a file. The caller closes it. Raises TargetError, with ENOENT if it is not there, or
        UsageError if a store does not have it."""
        ...

    def fetch_rest(self) -> None:
        """Read all of the files that are open, in the background: what is not local becomes so.

        Returns when that is done. Raises TargetError.
        """
        ...

    def on_request(self, count: Callable[[bool], object]) -> None:
        """Have ``count`` called with each request to a remote place, and with whether a reader waits for
        the answer."""
        ...

    def close(self) -> None:
        """Close what the files come from; all of them are closed before. A worker need not."""
        ...


OpenFiles: TypeAlias = Callable[[], ShownFiles]


def open_files(place: str, names: tuple[str, ...] | None = None, cache: str = "") -> ShownFiles:
    """Return the files of a place: an absolute path or a URL.

    ``names`` restricts a store to these snapshots; ``cache`` is the directory for the packs of a remote
    one, empty for the default. Raises TargetError, UsageError, SnapshotError for a damaged store or
    compact file, NotSupported without the libraries for it.
    """
    if "://" not in place and not os.path.isdir(place):
        return SingleFile(place)
    from pyqmigrate.mount.store_files import StoreFiles

    return StoreFiles(place, names, cache)


def reader_modules(place: str) -> list[str]:
    """Return the modules that :func:`open_files` needs for a place."""
    modules = ["pyqmigrate.mount.compact_file", "zstandard"]
    if "://" in place or os.path.isdir(place):
        modules = ["pyqmigrate.mount.store_files", "pyqmigrate.store.local_place", "zstandard"]
        if "://" in place and not place.startswith("file:"):
            modules += ["pyqmigrate.store.object_place", "obstore"]
    return modules


def import_readers(modules: Iterable[str]) -> None:
    """Import :func:`reader_modules`, so that a worker need not: it is forked."""
    for module in modules:
        with contextlib.suppress(ImportError):  # the worker says what is missing
            importlib.import_module(module)


class SingleFile:
    """One plain or compact file of a local disk, with its seal and the other files beside it."""

    readers = 1

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def names(self) -> Iterator[str]:
        for suffix in ("", *COMPANIONS):
            if os.path.exists(f"{self._path}{suffix}"):
                yield self._path.name + suffix

    def identity(self, name: str) -> str | None:
        if name != self._path.name:
            return None
        try:
            info = os.stat(self._path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise target_error(error, "cannot read", self._path) from error
        return f"{info.st_dev}:{info.st_ino}:{info.st_size}:{info.st_mtime_ns}"

    def open(self, name: str) -> PlainFile:
        plain = LocalPlainFile(self._path, COMPANIONS)
        if not is_compact(plain.read, plain.size):
            return plain
        plain.close()
        from pyqmigrate.mount.compact_file import CompactFile

        return CompactFile(self._path)

    def fetch_rest(self) -> None:
        """Do nothing: it is local."""

    def on_request(self, count: Callable[[bool], object]) -> None:
        """Do nothing: the kernel reads it."""

    def close(self) -> None:
        """Do nothing: only its files are open."""


class BytesFile:
    """A companion: a small file that is whole in memory. A :class:`PlainFile`."""

    companions: Mapping[str, bytes] = {}

    def __init__(self, content: bytes, mtime_ns: int) -> None:
        self.size = len(content)
        self.mtime_ns = mtime_ns
        self._content = memoryview(content)

    def read(self, offset: int, length: int) -> Bytes:
        return self._content[offset : offset + length]

    def next_data(self, offset: int) -> int | None:
        return offset if offset < self.size else None

    def next_hole(self, offset: int) -> int:
        return self.size

    def close(self) -> None:
        """Do nothing: a read may be under way, and the memory is freed after it."""
