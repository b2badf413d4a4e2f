"""The index of one block of a sequential stream: where in the file each page is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pyqmigrate._core as _core

__all__ = ["BlockIndex"]


class BlockIndex:
    """An index, empty at first; ``core`` is its ``qm_index *``. MemoryError."""

    def __init__(self, npages: int, page_size: int) -> None:
        core = _core.lib.qm_index_create(npages, page_size)
        if core == _core.ffi.NULL:
            raise MemoryError
        self.npages = npages
        self.core: Any = _core.ffi.gc(core, _core.lib.qm_index_destroy)

    def next(self, page: int) -> int:
        """Return the first page from ``page`` on that a record mentions, or ``npages``."""
        return int(_core.lib.qm_index_next(self.core, page))

    def data_pages(self) -> int:
        """Return how many pages are mentioned and not filled with zeros."""
        return int(_core.lib.qm_index_count(self.core))

    def run(self, first: int, end: int) -> tuple[int, bool]:
        """Return the end of the run of pages from ``first`` that are all data or all not, and
        whether they are data."""
        data = _core.ffi.new("int *")
        stop = int(_core.lib.qm_index_run(self.core, first, end, data))
        return stop, bool(data[0])

    def next_from(self, page: int, start: int, end: int) -> int:
        """Return the first page from ``page`` on whose content depends on the bytes
        ``[start, end)`` of the file, or ``npages``."""
        return int(_core.lib.qm_index_from(self.core, page, start, end))

    def words(self, first: int, npages: int) -> bytes:
        """Return the native 64-bit words of these pages (``enum qm_place``)."""
        words = _core.ffi.new("uint64_t[]", npages)
        _core.lib.qm_index_get(self.core, first, npages, words)
        return bytes(_core.ffi.buffer(words))

    def put_words(self, first: int, words: bytes, end: int) -> None:
        """Set the native words of the pages from ``first`` on, which are untrusted. ValueError for
        a place outside of a file of ``end`` bytes."""
        array = _core.ffi.from_buffer("uint64_t[]", words)
        _check(_core.lib.qm_index_put(self.core, first, len(array), array, end))

    def count_changes(self) -> int:
        return len(self._changes())

    def changes(self) -> Iterator[tuple[int, int, int]]:
        """Yield the changes (XBZRLE) to pages: what was before, file position, length."""
        for change in self._changes():
            yield change.before, change.at, change.len

    def _changes(self) -> Any:
        found = _core.ffi.new("const struct qm_change **")
        count = _core.lib.qm_index_changes(self.core, found)
        return found[0][0:count] if count else ()

    def put_change(self, before: int, position: int, length: int, end: int) -> None:
        """Add an untrusted change, before the words that refer to it. ValueError for a place
        outside of a file of ``end`` bytes."""
        change = _core.ffi.new("struct qm_change *")
        change.before, change.at, change.len = before, position, length
        _check(_core.lib.qm_index_put_changes(self.core, change, 1, end))


def _check(rc: int) -> None:
    if rc < 0:
        raise ValueError(os.strerror(-rc))
