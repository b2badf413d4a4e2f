"""Direct I/O: whether a file can be read or written past the page cache, and the alignment."""

from __future__ import annotations

import enum
import errno
import mmap
import os
from typing import Any, NamedTuple

from pyqmigrate import _core
from pyqmigrate.errors import DirectIORefused

__all__ = ["Direct", "DirectIO", "core_file", "find_direct"]

_FALLBACK_ALIGN = 4096
_LARGEST_ALIGN = 65536


class DirectIO(enum.StrEnum):
    """Whether pages bypass the page cache.

    ``on``: yes, or :class:`~pyqmigrate.errors.DirectIORefused`. ``off``: no. ``auto``: if the alignment is
    known and an aligned write works; not for writes to a file of which btrfs has checksums.
    """

    ON = "on"
    OFF = "off"
    AUTO = "auto"


class Direct(NamedTuple):
    """A descriptor with O_DIRECT, the alignment that it needs (bytes), and a sentence on it."""

    fd: int
    mem_align: int
    off_align: int
    reason: str


def find_direct(
    fd: int, given: int | None, setting: DirectIO, name: str, *, write_at: int | None
) -> tuple[Direct | None, str]:
    """Open (or take) the direct descriptor of the file ``fd`` and try it. ``write_at`` is where a
    unit may be written, None for a file that is only read.

    Return it, whose ``fd`` the caller closes, or None and why not. Raises DirectIORefused if direct
    I/O is demanded and not available.
    """
    if setting is DirectIO.OFF:
        return None, "switched off"
    alignment = _alignment(fd, setting)
    if isinstance(alignment, str):
        return None, alignment
    if setting is DirectIO.AUTO and write_at is not None and _core.lib.qm_buffers_direct_writes(fd):
        return None, (
            "btrfs has checksums of this file and makes direct writes buffered; it has none of files that are "
            "made in a directory with chattr +C"
        )
    mem_align, off_align = alignment
    flags = (os.O_WRONLY if write_at is not None else os.O_RDONLY) | os.O_DIRECT | os.O_CLOEXEC
    what, direct = "open with O_DIRECT", -1
    try:
        direct = os.open(f"/proc/self/fd/{fd}", flags) if given is None else given
        what = "aligned direct write" if write_at is not None else "aligned direct read"
        with mmap.mmap(-1, _LARGEST_ALIGN) as unit, memoryview(unit)[:off_align] as view:
            if write_at is None:
                os.preadv(direct, [view], 0)
            else:
                offset = -(-write_at // off_align) * off_align
                if os.pwritev(direct, [view], offset) != off_align:
                    raise OSError(errno.EIO, "short write")
    except OSError as error:
        if given is None and direct >= 0:
            os.close(direct)
        if setting is DirectIO.ON:
            raise DirectIORefused(
                error.errno or errno.EINVAL, f"direct I/O is not possible here ({what})", name
            ) from error
        return None, f"{what} failed: {error.strerror}"
    reason = f"works here: addresses aligned to {mem_align}, positions to {off_align} bytes"
    return Direct(direct, mem_align, off_align, reason), reason


def _alignment(fd: int, setting: DirectIO) -> tuple[int, int] | str:
    """Return the alignments of memory and file positions, or why direct I/O is not available."""
    mem, off = _core.ffi.new("uint32_t *"), _core.ffi.new("uint32_t *")
    rc = _core.lib.qm_direct_align(fd, mem, off)
    if rc == 0:
        # Writing part of a file system's block costs a read, or a wait for all other writers.
        block = os.fstat(fd).st_blksize
        if block > _LARGEST_ALIGN or block & (block - 1):
            block = _FALLBACK_ALIGN
        return int(mem[0]), max(int(off[0]), block)
    if setting is DirectIO.ON:
        return _FALLBACK_ALIGN, _FALLBACK_ALIGN
    if rc == -errno.ENOSYS:
        return "the kernel reports no alignment for direct I/O"
    return "the file system reports no alignment for direct I/O"


def core_file(fd: int, direct: Direct | None) -> Any:
    """Return the two descriptors as the core's ``struct qm_file *``; with ``fd`` -1 nothing is
    written."""
    file = _core.ffi.new("struct qm_file *")
    file.fd = fd
    file.fd_direct = direct.fd if direct else -1
    file.mem_align = direct.mem_align if direct else 1
    file.off_align = direct.off_align if direct else 1
    return file
