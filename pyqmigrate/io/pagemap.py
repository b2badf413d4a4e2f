"""The states of mapped pages: which are present, changed from their file, or newly touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pyqmigrate._core as _core
from pyqmigrate.core import JobState
from pyqmigrate.io.bitmap import Bitmap

__all__ = ["Find", "MappedPages", "add_bits", "address_of", "can_scan", "list_runs"]

_RUNS_AT_ONCE = 4096


class MappedPages:
    """The pages of a block in a process: ``struct qm_mapped_block``.

    ``pagemap`` is a descriptor of /proc/PID/pagemap, borrowed; ``has_scan`` what :func:`can_scan`
    returned. ``address`` and ``length`` are bytes.
    """

    def __init__(
        self, pagemap: int, address: int, length: int, page_size: int, *, has_scan: bool
    ) -> None:
        self.core: Any = _core.ffi.new("struct qm_mapped_block *")
        self.core.pagemap, self.core.has_scan = pagemap, has_scan
        self.core.address, self.core.len, self.core.page_size = address, length, page_size

    def find_changed(self, job: JobState, bits: Bitmap, first: int, npages: int) -> int:
        """Set the bits of pages that differ from the mapped file; 0 or a negative errno."""
        return int(_core.lib.qm_find_changed(job.core, self.core, bits.core, first, npages))

    def find_present(self, job: JobState, bits: Bitmap, first: int, npages: int) -> int:
        """Set the bits of pages that are in the page table; 0 or a negative errno."""
        return int(_core.lib.qm_find_present(job.core, self.core, bits.core, first, npages))


Find: TypeAlias = Callable[[MappedPages, JobState, Bitmap, int, int], int]


def can_scan(pagemap: int) -> bool:
    """Return whether the kernel has PAGEMAP_SCAN for this descriptor of /proc/PID/pagemap."""
    return bool(_core.lib.qm_process_can_scan(pagemap))


def add_bits(into: Bitmap, bits: Bitmap, new: Bitmap) -> bool:
    """Add ``bits`` to ``into``; leave in ``new`` those that were added. Return whether any was."""
    return bool(_core.lib.qm_add_bits(into.core, bits.core, new.core, into.npages))


def list_runs(bitmap: Bitmap, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield ``(first page, pages)`` for each run of set bits among ``[first, end)``, in order."""
    end = bitmap.npages if end is None else end
    found = _core.ffi.new("uint64_t[]", 2 * _RUNS_AT_ONCE)
    next_page = _core.ffi.new("uint64_t *", first)
    while next_page[0] < end:
        n = _core.lib.qm_list_runs(bitmap.core, next_page[0], end, found, _RUNS_AT_ONCE, next_page)
        for k in range(n):
            yield int(found[2 * k]), int(found[2 * k + 1])


def address_of(buffer: object) -> int:
    """Return the address of a buffer in this process."""
    view = _core.ffi.from_buffer("unsigned char[]", buffer)
    try:
        return int(_core.ffi.cast("uintptr_t", view))
    finally:
        _core.ffi.release(view)
