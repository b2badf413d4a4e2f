"""A plain snapshot in an object store, read by ranges."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from pyqmigrate.errors import TargetError
from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.seal import SUFFIX, count_pieces
from pyqmigrate.io.plain_file import Bytes
from pyqmigrate.store.place import Place

__all__ = ["ObjectFile"]

_WHOLE = 16 << 20  # bytes: a smaller object is one request
_WINDOW = 8 << 20  # bytes of a request for a larger one
_SEAL_MAX = 64 << 20  # bytes, beyond those that the size of the object requires: it may be cut off


class ObjectFile:
    """An object as a :class:`~pyqmigrate.io.plain_file.PlainFile`. For one thread.

    It keeps the bytes of one request, at most 16 MiB. ``place`` is borrowed. ``sealed``: there is a
    seal beside the object. ``poll`` is called before each request; what it raises ends the work.
    """

    def __init__(
        self,
        place: Place,
        key: str,
        size: int,
        *,
        sealed: bool,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.size = size
        self.mtime_ns = 0  # stores keep the time of the upload only
        self._place, self._key = place, key
        self._sealed = sealed
        self._poll = poll
        self._window = size if size <= _WHOLE else _WINDOW
        self._data = memoryview(b"")
        self._data_at = 0

    @property
    def companions(self) -> Mapping[str, bytes]:
        """The seal, if the object has one. Raises TargetError."""
        if not self._sealed:
            return {}
        self._poll()
        limit = count_pieces(self.size) * DIGEST_SIZE + _SEAL_MAX
        return {SUFFIX: bytes(self._place.read(self._key + SUFFIX, 0, limit))}

    def read(self, offset: int, length: int) -> Bytes:
        end = min(offset + length, self.size)
        parts = []
        while offset < end:
            start = offset - self._data_at
            if not 0 <= start < len(self._data):
                self._fetch(offset)
                start = offset - self._data_at
            part = self._data[start : start + end - offset]
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fetch(self, offset: int) -> None:
        """Fetch the window that ``offset`` is in."""
        self._poll()
        start = offset // self._window * self._window
        length = min(self._window, self.size - start)
        data = memoryview(self._place.read(self._key, start, length)).cast("B")
        if len(data) != length:
            raise TargetError(
                errno.ESTALE, "became shorter while it was read", f"{self._place.name}/{self._key}"
            )
        self._data, self._data_at = data, start

    def next_data(self, offset: int) -> int | None:
        return offset if offset < self.size else None

    def next_hole(self, offset: int) -> int:
        return self.size

    def close(self) -> None:
        self._data = memoryview(b"")
