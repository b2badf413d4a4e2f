"""Descriptors for QEMU's fdset, tested before they are passed.

QEMU takes from a fdset the member whose access mode and ``O_DIRECT`` are just those it asks for,
and one that finds none for its direct channels dies of it
(docs/internals/qemu-management.md, "Opening a fdset" and "Members that a migration needs").
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Mapping

from pyqmigrate.errors import DirectIORefused, TargetError
from pyqmigrate.io.output import OutputFile

__all__ = ["open_for_qemu"]

# Flags that QEMU compares, cannot clear, or would be misled by.
_CHECKED_FLAGS = os.O_ACCMODE | os.O_DIRECT | os.O_DSYNC | os.O_SYNC | os.O_APPEND


@contextlib.contextmanager
def open_for_qemu(target: OutputFile) -> Iterator[Mapping[str, int]]:
    """Open an empty target again, for writing only: as ``buffered``, and with direct I/O as
    ``direct``. They are closed afterwards.

    Raises TargetError if an open fails, DirectIORefused if a direct write fails.
    """
    modes = {"buffered": os.O_WRONLY}
    if target.direct is not None:
        modes["direct"] = os.O_WRONLY | os.O_DIRECT
    with contextlib.ExitStack() as stack:
        fds = {}
        for name, flags in modes.items():
            fds[name] = _open(target, flags)
            stack.callback(os.close, fds[name])
        if target.direct is not None:
            _test_direct(target, fds["direct"], target.direct.off_align)
        yield fds


def _open(target: OutputFile, flags: int) -> int:
    try:
        fd = os.open(f"/proc/self/fd/{target.fd}", flags | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or errno.EIO
        kind = DirectIORefused if flags & os.O_DIRECT else TargetError
        raise kind(number, "cannot open the file again for QEMU", target.name) from error
    same = os.path.samestat(os.fstat(fd), os.fstat(target.fd))
    if not same or fcntl.fcntl(fd, fcntl.F_GETFL) & _CHECKED_FLAGS != flags:
        os.close(fd)
        raise TargetError(
            errno.EINVAL,
            "opening the file again for QEMU gave another file or other flags",
            target.name,
        )
    return fd


def _test_direct(target: OutputFile, fd: int, alignment: int) -> None:
    try:
        with mmap.mmap(-1, alignment) as zeros:
            if os.pwrite(fd, zeros, 0) != alignment:
                raise OSError(errno.EIO, "short write")
        os.ftruncate(fd, 0)
    except OSError as error:
        raise DirectIORefused(
            error.errno or errno.EINVAL, "an aligned direct write failed", target.name
        ) from error
