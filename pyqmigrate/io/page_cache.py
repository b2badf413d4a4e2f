"""How much of a file is in the page cache, and how to drop it from there."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import pyqmigrate._core as _core
from pyqmigrate.errors import TargetError, target_error
from pyqmigrate.io.input import file_size

__all__ = ["cached_bytes", "drop_cached"]

# System call of Linux 6.5. Its structures begin with offset and length, and with the cached pages.
_CACHESTAT = 451
_WINDOW = 1 << 30  # bytes mapped at a time; a byte of answer for each page of it


def cached_bytes(fd: int) -> int:
    """Return how many bytes of the file are in the page cache, in whole pages of the machine.

    The kernel gives this only to the owner of the file and to users who may write it; for others all
    of the file seems to be cached. Raises TargetError if the file cannot be mapped.
    """
    import ctypes  # a restore that maps the file does not need it, and starts QEMU sooner

    libc = ctypes.CDLL(None, use_errno=True)
    whole, found = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
    # One call, whatever the size; mincore takes 10 s for the holes of 1 TiB.
    can_be_mapped = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
    asked = (_CACHESTAT, fd, ctypes.byref(whole), ctypes.byref(found), 0)
    if can_be_mapped and libc.syscall(*asked) == 0:
        return int(found[0]) * mmap.PAGESIZE
    return _resident_bytes(fd, libc.mincore)


def _resident_bytes(fd: int, mincore: Any) -> int:
    """Ask for each page: on kernels before 6.5, and if the kernel tells this user nothing."""
    import ctypes

    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    size = file_size(fd)
    pages = 0
    for offset in range(0, size, _WINDOW):
        length = min(_WINDOW, size - offset)
        answer = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        try:
            window = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)
        except OSError as error:
            raise target_error(error, "cannot map the file to see its page cache") from error
        with window:
            buffer = _core.ffi.from_buffer("unsigned char[]", window)
            try:
                address = int(_core.ffi.cast("uintptr_t", buffer))
                failed = mincore(address, length, answer)
            finally:
                _core.ffi.release(buffer)
        if failed:
            raise TargetError(ctypes.get_errno(), "cannot see the page cache of the file")
        # The other bits of an answer are reserved.
        pages += len(answer.raw.translate(None, delete=_NOT_RESIDENT))
    return pages * mmap.PAGESIZE


_NOT_RESIDENT = bytes(value for value in range(256) if not value & 1)


def drop_cached(fd: int) -> None:
    """Write the dirty pages of the file and ask the kernel to drop all of them from the page cache.

    Mapped pages stay. Blocks until the data is durable; raises TargetError.
    """
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise target_error(error, "cannot empty the page cache of the file") from error
