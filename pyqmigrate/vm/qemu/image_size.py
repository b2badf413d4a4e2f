"""The virtual size of a disk image. Only its header is read, and no lock is taken."""

from __future__ import annotations

import os
import stat
import struct

__all__ = ["image_size"]

_QCOW2 = struct.Struct(">4sI16xQ")  # magic, version, virtual size
_MAGIC = b"QFI\xfb"


def image_size(path: str) -> int | None:
    """Return the virtual size in bytes: that of a qcow2 image, or of the file.

    None for what is not a file or a block device, or cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return None
        head = os.pread(fd, _QCOW2.size, 0)
        if len(head) == _QCOW2.size and head.startswith(_MAGIC):
            return int(_QCOW2.unpack(head)[2])
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        return None
    finally:
        os.close(fd)
