"""Identify the state of an image file, and read the header of a qcow2.

A raw image shows changes by size and modification time only. A qcow2 has allocation tables, and
names its backing file. Its header and L1 table change with allocations, not with writes into
allocated clusters: a different digest proves a change, an equal one proves nothing.

Images are opened for reading, and only regular files.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import NamedTuple

from pyqmigrate.format.qcow2 import (
    BACKING_MAX,
    EXTENSIONS_MAX,
    HEADER_SIZE,
    backing_format,
    decode_header,
)
from pyqmigrate.vm.record.contents import ImageState

__all__ = ["Qcow2", "look_at_image", "look_at_qcow2"]

_L1_MAX = 1 << 20  # bytes of the L1 table that are read: enough for an image of 64 TiB


class Qcow2(NamedTuple):
    """The header of a qcow2.

    ``backing`` is the name of the backing file as recorded in the image, None without one;
    ``backing_format`` its format, None if not recorded. ``size`` is the virtual size in bytes.
    ``is_empty``: nothing was ever allocated, so all data comes from the backing file. ``digest``
    is of the header and the L1 table.
    """

    backing: str | None
    backing_format: str | None
    size: int
    is_empty: bool
    digest: str


def look_at_image(path: str | os.PathLike[str], *, qcow2: bool) -> ImageState | None:
    """Return the state of an image, None unless it is a readable regular file. ``qcow2``: whether
    that is its format."""
    with contextlib.suppress(OSError, ValueError):
        fd = _open(path)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                return None
            header = _read_qcow2(fd) if qcow2 else None
            return ImageState(
                info.st_size,
                max(info.st_mtime_ns, 0),
                info.st_dev,
                info.st_ino,
                None if header is None else header.digest,
            )
        finally:
            os.close(fd)
    return None


def look_at_qcow2(path: str | os.PathLike[str]) -> Qcow2 | None:
    """Return the header of the qcow2 at ``path``; None if it is not one, or unreadable."""
    with contextlib.suppress(OSError, ValueError):
        fd = _open(path)
        try:
            return _read_qcow2(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None
        finally:
            os.close(fd)
    return None


def _open(path: str | os.PathLike[str]) -> int:
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _read_qcow2(fd: int) -> Qcow2 | None:
    header = decode_header(os.pread(fd, HEADER_SIZE, 0))
    if header is None:
        return None
    import xxhash  # imported only for qcow2 disks

    l1 = os.pread(fd, min(8 * header.l1_entries, _L1_MAX), header.l1_offset)
    backing = None
    if header.backing_offset and header.backing_size <= BACKING_MAX:
        backing = os.fsdecode(os.pread(fd, header.backing_size, header.backing_offset))
    return Qcow2(
        backing,
        backing_format(os.pread(fd, EXTENSIONS_MAX, header.extensions_offset)),
        header.size,
        not any(l1) and 8 * header.l1_entries <= _L1_MAX,
        xxhash.xxh3_128_hexdigest(header.described() + l1),
    )
