"""The bitmap of one block: a bit for each page.

In the file a bitmap is a copy of the writer's array of 64-bit words, so its byte order is that of
the writing *host* (docs/internals/format.md, "Bitmap"); the file does not record it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from array import array
from collections.abc import Iterator
from typing import Any, Protocol

import pyqmigrate._core as _core
from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.holes import next_data, next_hole
from pyqmigrate.io.mapping import unmap

__all__ = ["Bitmap"]

_PIECE = 1 << 20  # bytes processed at once; a multiple of 8
_HOLE = 4096  # bytes: shorter runs of zeros are written
_SMALL = 4096  # bytes: a mapping would take more memory, and much more time


class _Readable(Protocol):
    @property
    def fd(self) -> int: ...
    @property
    def size(self) -> int: ...
    def read_at(self, offset: int, length: int) -> bytes: ...


class _Writable(Protocol):
    def write_at(self, offset: int, data: bytes | memoryview) -> None: ...


class Bitmap:
    """``npages`` bits, all clear at first. NotSupported if there is not enough memory. ``core`` is
    the ``uint64_t *`` for the core; UsageError after close.

    The kernel allocates the memory of a large bitmap when bits are set: a 1 TiB block with little
    data takes a few pages.
    """

    def __init__(self, npages: int) -> None:
        self.npages = npages
        self.nbytes = (npages + 63) // 64 * 8
        self._reach = npages  # after reading from a file: no bit from here on is set
        self._memory: Any
        self._mapping: mmap.mmap | None = None
        if self.nbytes <= _SMALL:
            self._buffer = _core.ffi.new("uint64_t[]", max(self.nbytes // 8, 1))
            self._memory = _core.ffi.buffer(self._buffer)
        else:
            self._memory = self._mapping = self._map()
            self._buffer = _core.ffi.from_buffer("unsigned char[]", self._memory)
        self._core: Any = _core.ffi.cast("uint64_t *", self._buffer)

    def _map(self) -> mmap.mmap:
        # Private: reading shared anonymous memory allocates it.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            return mmap.mmap(-1, self.nbytes, flags=flags)
        except (OSError, OverflowError) as error:
            raise NotSupported(
                f"a block of {self.npages} pages is too large: not enough memory for a bitmap of"
                f" {self.nbytes >> 20} MiB ({error})"
            ) from error

    @property
    def core(self) -> Any:
        if self._core is None:
            raise UsageError("the bitmap is closed, as is its snapshot")
        return self._core

    def __len__(self) -> int:
        return self.npages

    def __getitem__(self, page: int) -> bool:
        if not 0 <= page < self.npages:
            raise IndexError(f"page {page} of {self.npages}")
        return bool(self.core[page // 64] >> page % 64 & 1)

    def fill(self, data: memoryview) -> None:
        """Set the bits from bytes; page ``k`` is bit ``k % 8`` of byte ``k // 8``.

        UsageError for less than a byte for every eight pages; bits past the end are ignored.
        """
        if len(data) < (self.npages + 7) // 8:
            raise UsageError(f"a bitmap of {len(data)} bytes is too short for {self.npages} pages")
        self._memory[: self.nbytes] = bytes(data[: self.nbytes]).ljust(self.nbytes, b"\0")
        if sys.byteorder != "little":
            self._swap()
        if self.npages % 64:
            self.core[self.npages // 64] &= (1 << self.npages % 64) - 1

    def to_bytes(self) -> bytes:
        """Return the bits as :meth:`fill` takes them."""
        if sys.byteorder == "little":
            return bytes(self._memory[: self.nbytes])
        words = memoryview(self._memory)[: self.nbytes].cast("Q")
        return b"".join(word.to_bytes(8, "little") for word in words)

    def add(self, other: Bitmap) -> None:
        """Set the bits that are set in ``other``, a bitmap of as many pages."""
        if other.npages != self.npages:
            raise UsageError(f"bitmaps of {self.npages} and of {other.npages} pages")
        self._reach = max(self._reach, other._reach)
        for start, end in other._touched(other.nbytes):
            added = int.from_bytes(other._memory[start:end], sys.byteorder)
            if added:
                own = int.from_bytes(self._memory[start:end], sys.byteorder)
                self._memory[start:end] = (own | added).to_bytes(end - start, sys.byteorder)

    def remove(self, other: Bitmap) -> None:
        """Clear the bits that are set in ``other``, a bitmap of as many pages."""
        if other.npages != self.npages:
            raise UsageError(f"bitmaps of {self.npages} and of {other.npages} pages")
        for start, end in self._touched(self.nbytes):
            own = int.from_bytes(self._memory[start:end], sys.byteorder)
            if own:
                removed = int.from_bytes(other._memory[start:end], sys.byteorder)
                self._memory[start:end] = (own & ~removed).to_bytes(end - start, sys.byteorder)

    def add_all(self) -> None:
        """Set all bits."""
        self._reach = self.npages
        self._memory[: self.nbytes] = b"\xff" * self.nbytes
        if self.npages % 64:
            self.core[self.npages // 64] &= (1 << self.npages % 64) - 1

    def add_range(self, first: int, end: int) -> None:
        """Set the bits ``[first, end)``. UsageError unless these pages exist."""
        if not 0 <= first <= end <= self.npages:
            raise UsageError(f"pages {first} to {end} of {self.npages} do not exist")
        self._reach = max(self._reach, end)
        if first == end:
            return
        if sys.byteorder == "little":
            self._set(first, end)
            return
        for word in range(first // 64, (end - 1) // 64 + 1):
            low, high = max(first - word * 64, 0), min(end - word * 64, 64)
            self.core[word] |= (1 << high) - (1 << low)

    def remove_range(self, first: int, end: int) -> None:
        """Clear the bits ``[first, end)``. UsageError unless these pages exist."""
        if not 0 <= first <= end <= self.npages:
            raise UsageError(f"pages {first} to {end} of {self.npages} do not exist")
        if first == end:
            return
        core = self.core
        for word in range(first // 64, (end - 1) // 64 + 1):
            low, high = max(first - word * 64, 0), min(end - word * 64, 64)
            core[word] &= ~((1 << high) - (1 << low)) & 0xFFFFFFFFFFFFFFFF

    def count(self, npages: int | None = None) -> int:
        """Return how many of the first ``npages`` bits (default: all) are set."""
        return self._count(self.npages if npages is None else npages)[0]

    def count_between(self, first: int, end: int) -> int:
        """Return how many of the bits ``[first, end)`` are set."""
        if first >= end:
            return 0
        word = first // 64
        words, last = self.core + word, _core.ffi.new("int64_t *")
        return int(_core.lib.qm_count(words, end - word * 64, last)) - int(
            _core.lib.qm_count(words, first - word * 64, last)
        )

    def last(self) -> int:
        """Return the highest page whose bit is set, or -1."""
        return self._count(self.npages)[1]

    def _count(self, npages: int) -> tuple[int, int]:
        last, found, highest = _core.ffi.new("int64_t *"), 0, -1
        npages = min(npages, self._reach)
        if npages <= _PIECE * 8:
            return int(_core.lib.qm_count(self.core, npages, last)), int(last[0])
        for start, end in self._touched((npages + 63) // 64 * 8):
            pages = min(npages - start * 8, (end - start) * 8)
            count = int(_core.lib.qm_count(self.core + start // 8, pages, last))
            if count:
                found, highest = found + count, start * 8 + int(last[0])
        return found, highest

    def _touched(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield the pieces, ``[start, end)``, of the first ``nbytes`` that may contain set bits.

        The work depends on the bits that were set, not on the length that a block claims.
        """
        if nbytes <= _PIECE:
            yield 0, nbytes
            return
        start = 0
        with _own_pagemap() as pagemap:
            while start < nbytes:
                start = self._next_touched(pagemap, start, nbytes)
                end = min(start + _PIECE, nbytes)
                if start < end:
                    yield start, end
                start = end

    def may_hold(self, first: int, npages: int) -> bool:
        """Return whether any of these bits may be set; ``first`` is a multiple of 64. False only for
        memory of a long bitmap that was never touched."""
        start, end = first // 8, (first + npages + 63) // 64 * 8
        if self.nbytes <= _PIECE:
            return True
        with _own_pagemap() as pagemap:
            return self._next_touched(pagemap, start, end) < end

    def _next_touched(self, pagemap: int, start: int, end: int) -> int:
        can_scan = _core.lib.qm_process_can_scan(pagemap)
        found = _core.lib.qm_next_touched(pagemap, can_scan, self.core, start, end)
        return int(found) // 8 * 8

    def run_end(self, first: int, end: int) -> int:
        """Return the end, at most ``end``, of the run of equal bits that starts at ``first``."""
        return int(_core.lib.qm_run(self.core, first, end))

    def runs(self, first: int = 0, end: int | None = None) -> list[tuple[int, int, bool]]:
        """Return ``(from, to, set)`` for the runs of equal bits in ``[first, end)``."""
        end = self.npages if end is None else end
        found: list[tuple[int, int, bool]] = []
        start = first
        for page in range(first, end + 1):
            if page == end or self[page] != self[start]:
                if page > start:
                    found.append((start, page, self[start]))
                start = page
        return found

    def write_to(self, target: _Writable, offset: int, *, everything: bool) -> None:
        """Write the words at ``offset``. Runs of zeros are written only with ``everything``."""
        with memoryview(self._memory) as view:
            if everything:
                for start in range(0, self.nbytes, _PIECE):
                    target.write_at(offset + start, view[start : min(start + _PIECE, self.nbytes)])
                return
            for first, end in self._touched(self.nbytes):
                for start in range(first, end, _HOLE):
                    piece = view[start : min(start + _HOLE, end)]
                    if not _core.lib.qm_is_zero(_core.ffi.from_buffer(piece), len(piece)):
                        target.write_at(offset + start, piece)

    @classmethod
    def read_from(cls, source: _Readable, layout: BlockLayout, byteorder: str) -> Bitmap:
        """Return the bitmap of a block, checked against the block and the size of the file.

        Holes are skipped, so no more memory is allocated than the file has data. Raises
        SnapshotError for bits past the end of the block, for pages past the end of the file, and for
        a bitmap that is cut off.
        """
        if layout.external:
            return cls(0)  # the size of this file does not bound the length
        try:
            bitmap = cls(layout.num_pages)
        except (OSError, OverflowError, ValueError) as error:
            raise SnapshotError(
                f"not enough memory for a bitmap of {layout.num_pages} pages: {error}",
                offset=layout.bitmap_offset,
                block=layout.name,
                field="bitmap",
            ) from error
        try:
            bitmap._read(source, layout)
            if byteorder != sys.byteorder:
                bitmap._swap()
            bitmap._check(layout, source.size)
        except BaseException:
            bitmap.close()
            raise
        return bitmap

    @classmethod
    def of_extents(cls, fd: int, layout: BlockLayout) -> Bitmap:
        """Return a bitmap of the pages that the regular file ``fd`` has any data for.

        The others lie in holes of the file, and read as zeros. Moves the position of ``fd``.
        """
        bitmap = cls(layout.num_pages)
        start, end, page_size = layout.pages_offset, layout.pages_end, layout.page_size
        position = next_data(fd, start, end)
        while position < end:
            hole = next_hole(fd, position, end)
            bitmap._set((position - start) // page_size, -(-(hole - start) // page_size))
            position = next_data(fd, hole, end)
        if sys.byteorder != "little":
            bitmap._swap()
        return bitmap

    def _set(self, first: int, end: int) -> None:
        """Set the bits ``[first, end)``, as bytes of little-endian words."""
        first_byte, last_byte = first // 8, (end - 1) // 8
        first_mask, last_mask = 0xFF << first % 8 & 0xFF, 0xFF >> 7 - (end - 1) % 8
        with memoryview(self._memory).cast("B") as memory:
            if first_byte == last_byte:
                memory[first_byte] |= first_mask & last_mask
                return
            memory[first_byte] |= first_mask
            memory[first_byte + 1 : last_byte] = b"\xff" * (last_byte - first_byte - 1)
            memory[last_byte] |= last_mask

    def _read(self, source: _Readable, layout: BlockLayout) -> None:
        needed = layout.bitmap_offset + (self.npages + 7) // 8  # writers of 32-bit words stop there
        end = layout.bitmap_offset + self.nbytes
        offset = layout.bitmap_offset
        self._reach = 0
        while offset < end:
            offset = next_data(source.fd, offset, end)  # the memory is zero already
            data = source.read_at(offset, min(_PIECE, end - offset))
            start = offset - layout.bitmap_offset
            self._memory[start : start + len(data)] = data
            if not data:
                if offset < needed:
                    raise self._cut_off(offset, layout)
                break
            self._reach = min((start + len(data) + 7) // 8 * 64, self.npages)
            offset += len(data)
        if source.size < needed:
            raise self._cut_off(source.size, layout)

    def _cut_off(self, offset: int, layout: BlockLayout) -> SnapshotError:
        return SnapshotError(
            "the file ends within the bitmap", offset=offset, block=layout.name, field="bitmap"
        )

    def _swap(self) -> None:
        for start, end in self._touched((self._reach + 63) // 64 * 8):
            words = array("Q", self._memory[start:end])
            words.byteswap()
            self._memory[start:end] = words.tobytes()

    def _check(self, layout: BlockLayout, size: int) -> None:
        word = self.nbytes // 8 - 1
        if self.core[word] >> (self.npages - word * 64):
            raise SnapshotError(
                f"bits are set past page {self.npages}, the end of the block: damage, or a file"
                " from a host of the other byte order (bitmap_order, --bitmap-order)",
                offset=layout.bitmap_offset + word * 8,
                block=layout.name,
                field="bitmap",
            )
        last = self.last()
        if last >= 0 and layout.pages_offset + (last + 1) * layout.page_size > size:
            raise SnapshotError(
                f"page {last} is marked as present, but the file ends at {size:#x}: truncated",
                offset=layout.pages_offset + last * layout.page_size,
                block=layout.name,
                field="pages",
            )

    def close(self) -> None:
        """Free the memory. Idempotent."""
        self._core = None
        _core.ffi.release(self._buffer)
        if self._mapping is not None:
            unmap(self._mapping)


@contextlib.contextmanager
def _own_pagemap() -> Iterator[int]:
    """Open /proc/self/pagemap; -1 without one, and then all memory counts as touched."""
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield -1
        return
    try:
        yield pagemap
    finally:
        os.close(pagemap)
