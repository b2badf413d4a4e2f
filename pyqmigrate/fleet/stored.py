"""The snapshots of a store."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
from collections.abc import Iterator

from pyqmigrate.errors import TargetError
from pyqmigrate.fleet.target import Kind, Target
from pyqmigrate.format.store.keys import CONFIG_KEY, SNAPSHOTS, name_of_snapshot
from pyqmigrate.store.place import open_place

__all__ = ["list_store"]


def list_store(text: str, pattern: str) -> Iterator[Target]:
    """Yield the snapshots of the store ``text`` whose names fit ``pattern``.

    Only a listing is read. Raises TargetError, with ENOENT if there is no store or no snapshot of
    the name ``pattern``, UsageError, NotSupported.
    """
    with contextlib.closing(open_place(text)) as place:
        if place.find(CONFIG_KEY) is None:
            raise TargetError(errno.ENOENT, "there is no store", place.name)
        found = False
        for entry in sorted(place.list(SNAPSHOTS), key=lambda entry: entry.key):
            name = name_of_snapshot(entry.key)
            if name is None or not (name == pattern or fnmatch.fnmatchcase(name, pattern)):
                continue
            found = True
            yield Target(
                f"{place.name}#{name}",
                Kind.STORED,
                place.name,
                name,
                entry.size,
                name,
                f"{entry.size}:{entry.mtime!r}:{entry.etag}",
                named=name == pattern,
            )
        if not found and pattern != "*":
            raise TargetError(errno.ENOENT, "no such snapshot", f"{place.name}#{pattern}")
