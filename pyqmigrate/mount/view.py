"""Make the views through which snapshots of stores and compact files are read (:mod:`pyqmigrate.io.view`).

A view is a private mount, or a copy where nothing can be mounted. ``io`` finds :func:`make_view` by its
name: it cannot import what is above it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyqmigrate.errors import NotSupported, TargetError, target_error
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.io.view import View, ViewOptions
from pyqmigrate.log import logger
from pyqmigrate.mount.files import open_files
from pyqmigrate.mount.private import FileRange, open_private

__all__ = ["MountedView", "make_view"]


def make_view(place: str, name: str | None, options: ViewOptions) -> View:
    """Return a view of a snapshot; the caller closes it.

    place: the absolute path of a store or of a compact file, or the URL of a store.
    name: the snapshot of the store; None for a compact file.

    Raises TargetError if the store or the snapshot cannot be read, SnapshotError if it is damaged,
    UsageError for what is not a store and for a name that no snapshot has, NotSupported without the
    libraries for it.
    """
    if name is not None and not options.pages:
        from pyqmigrate.mount.heads import open_heads

        return open_heads(place, name, os.fspath(options.cache or ""))
    try:
        return MountedView(place, name, options)
    except NotSupported as error:
        logger.info("nothing can be mounted, so the snapshot is copied: %s", error)
    from pyqmigrate.mount.copied import CopiedView

    with _open_plain(place, name, options) as file:
        return CopiedView(file, name or Path(place).name)


@contextlib.contextmanager
def _open_plain(place: str, name: str | None, options: ViewOptions) -> Iterator[PlainFile]:
    """Open the snapshot in this process."""
    name = name or Path(place).name
    with (
        contextlib.closing(open_files(place, (name,), os.fspath(options.cache or ""))) as files,
        contextlib.closing(files.open(name)) as file,
    ):
        yield file


class MountedView:
    """A private mount of a snapshot, whose name is taken away at once: a :class:`View`.

    Arguments and errors are those of :func:`make_view`; NotSupported if nothing can be mounted.
    """

    pushes = True

    def __init__(self, place: str, name: str | None, options: ViewOptions) -> None:
        self._place, self._stored, self._name = place, name, name or Path(place).name
        self._shown = place if name is None else f"{place}#{name}"
        self._directory = -1
        self._asking = threading.Lock()
        self._mount = open_private(
            place,
            names=None if name is None else (name,),
            record=options.record,
            cache=os.fspath(options.cache or ""),
        )
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            self._directory = os.open(self._mount.path, flags)
            self._mount.hide()
            os.stat(self._name, dir_fd=self._directory)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, TargetError):
                # The kernel does not say why; opening it here does.
                with _open_plain(place, name, options):
                    pass
                raise target_error(error, "cannot read", self._shown) from error
            raise
        # The name is gone: the path leads through the descriptor.
        self.path = Path(f"/proc/self/fd/{self._directory}", self._name)

    def push(self, ranges: Iterable[tuple[int, int]]) -> None:
        with self._asking:
            self._mount.push(FileRange(self._name, offset, length) for offset, length in ranges)

    def fetch_rest(self) -> None:
        with self._asking:
            self._mount.fetch_rest()

    def status(self) -> dict[str, Any]:
        """Return what the keeper says of it (:meth:`PrivateMount.status`). Raises TargetError."""
        with self._asking:
            return self._mount.status()

    def requests(self) -> Sequence[tuple[int, int]]:
        with self._asking:
            reads = self._mount.requests()
        return [(read.offset, read.length) for read in reads if read.name == self._name]

    def messages(self) -> Sequence[str]:
        try:
            return [str(message["text"]) for message in self.status()["messages"]]
        except TargetError:  # the keeper has ended
            return ()

    def check_recordable(self) -> str:
        from pyqmigrate.mount.working_sets import check_recordable

        return check_recordable(self._place, self._stored)

    def write_working_set(self, content: bytes) -> None:
        from pyqmigrate.mount.working_sets import write_working_set

        write_working_set(self._place, self._stored, content)

    def close(self) -> None:
        """Let go of the mount, which ends with its last open file. Idempotent."""
        self._mount.close()
        if self._directory >= 0:
            os.close(self._directory)
        self._directory = -1
