"""Memory that a file is read into, in huge pages where the kernel has them.

A device takes a few hundred pieces of memory in a request. A direct read of 1 MiB into scattered pages of
4 KiB becomes two requests, and each has as many pieces as pages; one into a huge page is a single piece.
"""

from __future__ import annotations

import contextlib
import mmap

import pyqmigrate._core as _core

__all__ = ["huge_buffer"]

_HUGE_PAGE = 2 << 20  # bytes; with other page sizes it is only an alignment


def huge_buffer(size: int) -> memoryview:
    """Return ``size`` bytes of private memory, zeroed, that begin at a multiple of 2 MiB.

    The memory is freed with the last view of it. A child that is forked does not have it. Raises OSError
    if there is no memory.
    """
    whole = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    # Only aligned memory can be one huge page; shared memory has none unless the machine allows it.
    memory = mmap.mmap(-1, whole + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with _core.ffi.from_buffer("unsigned char[]", memory) as address:
        start = -int(_core.ffi.cast("uintptr_t", address)) % _HUGE_PAGE
    memory.madvise(mmap.MADV_DONTFORK)  # a child would split it from what is read
    with contextlib.suppress(OSError):  # not every kernel has huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return memoryview(memory)[start : start + size]
