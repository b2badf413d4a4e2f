"""Huge pages for the memory of another process, whose pages came one by one."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Sequence

__all__ = ["collapse"]

_HUGE = 2 << 20
_PROCESS_MADVISE = 440  # system call, the same on all architectures
_MADV_COLLAPSE = 25
_GIVE_UP = (errno.EPERM, errno.ENOSYS, errno.ESRCH, errno.EBADF)


def collapse(pidfd: int, areas: Iterable[Sequence[int]]) -> int:
    """Have the kernel make huge pages of ``areas``, each an address and a length in the process; return
    how many bytes that was possible for. Blocks. Raises OSError if it is not possible at all."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = 0
    for address, length in areas:
        first = -(-address // _HUGE) * _HUGE
        for start in range(first, (address + length) // _HUGE * _HUGE, _HUGE):
            vector = (ctypes.c_size_t * 2)(start, _HUGE)
            result = libc.syscall(_PROCESS_MADVISE, pidfd, vector, 1, _MADV_COLLAPSE, 0)
            if result > 0:
                done += _HUGE
            elif ctypes.get_errno() in _GIVE_UP:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done
