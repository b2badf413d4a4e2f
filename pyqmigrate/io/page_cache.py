"""What a file holds in the page cache, and how to empty it."""

from __future__ import annotations

import errno
import mmap
import os

import pyqmigrate._core as _core
from pyqmigrate.errors import TargetError
from pyqmigrate.io.input import file_size

__all__ = ["cached_bytes", "drop_cached"]

_WINDOW = 1 << 30  # bytes mapped at a time; a byte of answer for each page of it


def cached_bytes(fd: int) -> int:
    """Bytes of the file that are in the page cache now, in whole pages of the machine.

    The kernel tells the truth only to the file's owner and to who may write it; to others all
    of the file seems cached. Raises TargetError when the file cannot be mapped.
    """
    import ctypes  # a restore that maps the file does not ask, and starts QEMU sooner

    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    size = file_size(fd)
    pages = 0
    for at in range(0, size, _WINDOW):
        length = min(_WINDOW, size - at)
        answer = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        try:
            window = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=at)
        except OSError as error:
            raise TargetError(
                error.errno or errno.EIO, "cannot map the file to see its page cache"
            ) from error
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
    """Write back what is dirty and ask the kernel to forget the file's cached pages.

    Pages that somebody has mapped stay. Blocks until the data is durable; raises TargetError.
    """
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise TargetError(
            error.errno or errno.EIO, "cannot empty the page cache of the file"
        ) from error
