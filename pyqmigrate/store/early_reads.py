"""Objects of a place that are requested before they are needed.

To open a snapshot takes three objects, each of which is needed to know that the next one is. From a place
that is far away they are requested at the same time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pyqmigrate.store.place import Bytes, Entry, Place

__all__ = ["EarlyReads"]

_FRESH = 5.0  # seconds: after that an object is read again
_MOST = 64 << 20  # bytes of one object


class EarlyReads:
    """The place ``place``, a :class:`~pyqmigrate.store.place.Place`, with ``keys`` requested at once.

    What is read of them within five seconds is what was there then.
    """

    def __init__(self, place: Place, keys: Iterable[str]) -> None:
        self._place = place
        self._until = time.monotonic() + _FRESH
        self._lock = threading.Lock()
        wanted = list(keys)
        pool = ThreadPoolExecutor(max(len(wanted), 1), "pyqmigrate-early")
        self._found: dict[str, Future[Bytes]] = {
            key: pool.submit(place.read, key, 0, _MOST) for key in wanted
        }
        pool.shutdown(wait=False)

    @property
    def name(self) -> str:
        return self._place.name

    @property
    def directory(self) -> Path | None:
        return self._place.directory

    def read(self, key: str, offset: int = 0, length: int | None = None) -> Bytes:
        early = self._early(key)
        if early is not None:
            try:
                data = memoryview(early.result())
            except OSError:
                self._forget(key)
                raise
            if len(data) < _MOST:  # all of it
                return data[offset:] if length is None else data[offset : offset + length]
            self._forget(key)
        return self._place.read(key, offset, length)

    def read_end(self, key: str, length: int) -> tuple[Bytes, int]:
        return self._place.read_end(key, length)

    def find(self, key: str) -> Entry | None:
        return self._place.find(key)

    def write_new(self, key: str, data: Bytes) -> bool:
        self._forget(key)
        return self._place.write_new(key, data)

    def replace(self, key: str, data: Bytes) -> None:
        self._forget(key)
        self._place.replace(key, data)

    def delete(self, key: str) -> bool:
        self._forget(key)
        return self._place.delete(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._place.list(prefix)

    def close(self) -> None:
        with self._lock:
            self._found.clear()
        self._place.close()

    def _early(self, key: str) -> Future[Bytes] | None:
        with self._lock:
            if time.monotonic() > self._until:
                self._found.clear()
            return self._found.get(key)

    def _forget(self, key: str) -> None:
        with self._lock:
            self._found.pop(key, None)
