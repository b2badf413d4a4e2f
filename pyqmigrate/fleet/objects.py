"""The plain snapshots behind a prefix of an object store."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
from collections.abc import Iterator

from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.fleet.target import Kind, Target, companion_of
from pyqmigrate.format.seal import SUFFIX
from pyqmigrate.store.place import Entry, open_place

__all__ = ["list_objects"]

_CONFIG = "store.json"
_PATTERN = frozenset("*[")


def list_objects(url: str) -> Iterator[Target]:
    """Yield what a URL means: one object; with a slash at the end all objects behind the prefix, or
    the snapshots of the store that is there; with a pattern in its last part the objects that fit.

    Raises TargetError, with ENOENT if there is no such object, UsageError, NotSupported.
    """
    if "?" in url:  # not shown: it may be a credential
        raise UsageError("a URL has no query here: give credentials in the environment")
    if url.endswith("/"):
        return _behind_prefix(url, "*")
    front, slash, last = url.rpartition("/")
    if not slash or front.endswith("/"):
        # The URL is not shown: it may contain credentials.
        raise UsageError("a URL names no object: a prefix, or a bucket, ends with a slash")
    if _PATTERN.intersection(last):
        return _behind_prefix(f"{front}/", last)
    return _one(f"{front}/", last)


def _one(prefix: str, key: str) -> Iterator[Target]:
    with contextlib.closing(open_place(prefix)) as place:
        entry = place.find(key)
        if entry is None:
            if place.find(f"{key}/{_CONFIG}") is not None:
                from pyqmigrate.fleet.stored import list_store

                yield from list_store(f"{prefix}{key}", "*")
                return
            raise TargetError(
                errno.ENOENT, "no such object, and a prefix ends with a slash", f"{prefix}{key}"
            )
        yield _object(place.name, entry, place.find(key + SUFFIX), named=True)


def _behind_prefix(prefix: str, pattern: str) -> Iterator[Target]:
    with contextlib.closing(open_place(prefix)) as place:
        entries = {entry.key: entry for entry in place.list("")}
        if _CONFIG in entries:
            from pyqmigrate.fleet.stored import list_store

            yield from list_store(prefix, pattern)
            return
        for key, entry in sorted(entries.items()):
            if companion_of(key, entries) is None and fnmatch.fnmatchcase(key, pattern):
                yield _object(place.name, entry, entries.get(key + SUFFIX))


def _object(place: str, entry: Entry, seal: Entry | None, *, named: bool = False) -> Target:
    identity = _identity(entry) if seal is None else f"{_identity(entry)}+{_identity(seal)}"
    return Target(
        f"{place.rstrip('/')}/{entry.key}",
        Kind.OBJECT,
        place,
        entry.key,
        entry.size,
        entry.key,
        identity,
        seal is not None,
        named,
    )


def _identity(entry: Entry) -> str:
    return f"{entry.size}:{entry.mtime!r}:{entry.etag}"
