"""What shows whether an image file is still as it was, and what a qcow2 says of itself.

A raw image shows changes by size and modification time only. A qcow2 has tables of what was
allocated, and names the file below. Its header and its L1 table change with allocations, not with
writes into what is allocated: another digest is another content, the same one proves nothing.

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

_L1_MAX = 1 << 20  # bytes of the L1 table that are looked at: enough for an image of 64 TiB


class Qcow2(NamedTuple):
    """What a qcow2 says.

    ``backing`` is the name of the file below as it is written in the image, None without one;
    ``backing_format`` its format, None where the image does not say. ``size`` is what a guest
    sees, bytes. ``is_empty`` says that nothing was ever written to it, so that all comes from the
    file below. ``digest`` is of the header and the L1 table.
    """

    backing: str | None
    backing_format: str | None
    size: int
    is_empty: bool
    digest: str


def look_at_image(path: str | os.PathLike[str], *, qcow2: bool) -> ImageState | None:
    """The state of an image, ``qcow2`` being whether that is its format; None where it is not a
    regular file that can be read here."""
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
    """What the qcow2 at ``path`` says; None where that is none, or cannot be read here."""
    with contextlib.suppress(OSError, ValueError):
        fd = _open(path)
        try:
            return _read_qcow2(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None
        finally:
            os.close(fd)
    return None


def _open(path: str | os.PathLike[str]) -> int:
    # O_NONBLOCK: to open a FIFO must not wait for a writer.
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _read_qcow2(fd: int) -> Qcow2 | None:
    header = decode_header(os.pread(fd, HEADER_SIZE, 0))
    if header is None:
        return None
    import xxhash  # a restore whose disks have no qcow2 does without it

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
