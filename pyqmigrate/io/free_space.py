"""The free space of a file system."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["free_bytes"]


def free_bytes(file: int | Path) -> int | None:
    """Return the bytes that this user can still allocate on the file system of ``file``.

    None where the file system has no limit (a memfd). Root may use the reserved blocks too. Raises
    OSError.
    """
    info = os.statvfs(file)
    if info.f_blocks == 0:
        return None
    return (info.f_bfree if os.geteuid() == 0 else info.f_bavail) * info.f_frsize
