"""A pipe, socket or character device that a stream is written to, front to back.

Written bytes cannot be changed, so the magic comes first, and a reader learns from the end of the
stream, or from the writer's exit code, whether it is complete.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from typing import TypeGuard

from pyqmigrate.errors import UsageError
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.target import Descriptors, Target

__all__ = ["ForwardOutput", "goes_forward"]


def goes_forward(target: Target) -> TypeGuard[Descriptors]:
    """Return whether the target is a descriptor without file positions."""
    if not isinstance(target, Descriptors):
        return False
    try:
        mode = os.fstat(target.buffered).st_mode
    except (OSError, TypeError, ValueError):
        return False  # opening it raises the error
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


class ForwardOutput(OutputFile):
    """The output of a sequential stream that does not go into a file. The descriptor is borrowed.

    ``fd`` is a separate open file description if the system allows that: it does not wait for a
    reader, so that the work can be cancelled.
    """

    forward = True

    def __init__(self, target: Descriptors) -> None:
        super().__init__(target, reuse=False)
        given = target.buffered
        if target.direct is not None or target.offset:
            raise UsageError("a pipe has neither a direct descriptor nor an offset")
        if fcntl.fcntl(given, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise UsageError(f"descriptor {given} cannot write; open it with O_WRONLY")
        if os.isatty(given):
            raise UsageError(f"descriptor {given} is a terminal: give a file or a pipe")
        self.direct_io_reason = "a pipe has no direct I/O"
        try:
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
            self.fd = os.open(f"/proc/self/fd/{given}", flags)
        except OSError:  # a socket
            self.fd = os.dup(given)

    def free_bytes(self) -> None:
        """Return None: there is no limit."""

    def set_size(self, size: int) -> None:
        """Do nothing: a pipe has no size."""

    def publish(self, magic: bytes, check: Callable[[], None]) -> None:
        """Finish: everything is written, and nothing can be made durable."""
        check()
        self.published = True

    def close(self) -> None:
        """Close it. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
