"""Where the objects of a store are: a directory, or a prefix of an object store.

An object is some bytes under a key. A key is a relative path with slashes, such as
``packs/0123.pack``. Every object is written as a whole, and is visible when it is complete and
durable::

    place = open_place("/srv/store")            # or file://, s3://, gs://, az://, https://, memory://
    place.write_new("snapshots/a.snap", data)   # False if there is one
    place.read("snapshots/a.snap")
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias
from urllib.parse import SplitResult, unquote, urlsplit

from pyqmigrate.errors import SnapshotError, TargetError, UsageError

__all__ = [
    "Bytes",
    "Entry",
    "Place",
    "check_key",
    "is_unreachable",
    "open_place",
    "read_at_most",
    "split_url",
]

Bytes: TypeAlias = bytes | bytearray | memoryview

_KEY_MAX = 1024  # bytes, the limit of S3
_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ECONNREFUSED)


@dataclass(frozen=True)
class Entry:
    """An object that was listed: ``size`` in bytes, ``mtime`` when it was written, in seconds since
    1970 by the clock of the place. ``etag`` changes when the content does, where the place has such
    tags."""

    key: str
    size: int
    mtime: float
    etag: str = ""


class Place(Protocol):
    """A place of objects; all methods may be called by several threads at once.

    The methods raise TargetError, whose ``filename`` is the place and the key, without credentials,
    and NotSupported where the place cannot do the work (an HTTP server that lists nothing). For
    :func:`is_unreachable` errors a later call may succeed.
    """

    @property
    def name(self) -> str:
        """The place as messages name it, without credentials."""
        ...

    @property
    def directory(self) -> Path | None:
        """The absolute path of a local place; None for an object store."""
        ...

    def read(self, key: str, offset: int = 0, length: int | None = None) -> Bytes:
        """Return ``length`` bytes at ``offset``, or all to the end; fewer only at the end of the
        object. Raises TargetError, with ENOENT if there is no such object."""
        ...

    def read_end(self, key: str, length: int) -> tuple[Bytes, int]:
        """Return the last ``length`` bytes, or all if there are fewer, and the object's size."""
        ...

    def find(self, key: str) -> Entry | None:
        """Return the size and time of one object; None if there is no such object."""
        ...

    def write_new(self, key: str, data: Bytes) -> bool:
        """Write a new object, durable when this returns; return False if the key exists, whose
        object is not changed."""
        ...

    def replace(self, key: str, data: Bytes) -> None:
        """Write an object, durable when this returns; a reader gets the old or the new one."""
        ...

    def delete(self, key: str) -> bool:
        """Delete an object; return False if it is known that there was none."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose key begins with ``prefix``, which is empty or ends with a slash."""
        ...

    def close(self) -> None:
        """Close it. Idempotent."""
        ...


def open_place(text: str, *, create: bool = False) -> Place:
    """Open the directory or the URL ``text``; ``create`` makes a directory that is missing.

    Schemes are ``file``, ``s3``, ``gs``, ``az``, ``http``, ``https`` and ``memory`` (of this process).
    Credentials and the endpoint come from the environment, as the provider's own tools take them
    (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...). Nothing is read from an object store yet. Raises
    UsageError for another scheme, NotSupported without the library obstore, TargetError.
    """
    scheme, separator, _ = text.partition("://")
    if not separator:
        from pyqmigrate.store.local_place import LocalPlace

        return LocalPlace(text, create=create)
    if scheme == "file":
        from pyqmigrate.store.local_place import LocalPlace

        parts = split_url(text)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UsageError(f"{text!r} is not the URL of a local directory: file:///PATH")
        return LocalPlace(unquote(parts.path), create=create)
    from pyqmigrate.store.object_place import ObjectPlace

    return ObjectPlace(text)


def split_url(url: str) -> SplitResult:
    """Return the parts of a URL. Raises UsageError for one that has no such parts."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise UsageError("this URL is malformed: s3://BUCKET/PREFIX is not") from None
    return parts


def check_key(key: str) -> tuple[str, ...]:
    """Return the parts of a key. Raises UsageError unless they are names below the place."""
    parts = tuple(key.split("/"))
    if (
        any(part in ("", ".", "..") for part in parts)
        or "\0" in key
        or len(key.encode("utf-8", "surrogateescape")) > _KEY_MAX
    ):
        raise UsageError(f"{key!r} is not the key of an object: names with slashes between them")
    return parts


def is_unreachable(error: BaseException) -> bool:
    """Return whether the place did not answer, so that a later call may succeed."""
    return isinstance(error, TargetError) and error.errno in _UNREACHABLE


def read_at_most(place: Place, key: str, limit: int, what: str) -> Bytes:
    """Return a whole object of at most ``limit`` bytes. Raises SnapshotError if it is larger; ``what``
    names it."""
    data = place.read(key, 0, limit + 1)
    if len(data) > limit:
        raise SnapshotError(f"the {what} {key!r} of {place.name} is larger than {limit} bytes")
    return data
