"""A child process that ends when this process does, whatever ends it, until it is let off.

The child inherits the reading end of a pipe, and nobody but this process has the writing end. When
that is closed, the kernel sends a signal to the pipe's owner, which is the child (``F_SETOWN``,
``O_ASYNC``). Other than with ``PR_SET_PDEATHSIG`` it is this process that counts and not one of
its threads, and it can be called off from here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal

__all__ = ["Lifeline"]


class Lifeline:
    """Pass ``fd`` on to the child, then :meth:`hold` it. Close it, which lets the child off."""

    def __init__(self) -> None:
        self.fd, self._writer = os.pipe2(os.O_CLOEXEC)

    def hold(self, pid: int) -> None:
        """From here on SIGKILL is what process ``pid`` gets when this one ends."""
        fcntl.fcntl(self.fd, fcntl.F_SETOWN, pid)
        fcntl.fcntl(self.fd, fcntl.F_SETSIG, signal.SIGKILL)
        self._signal(True)

    def close(self) -> None:
        """The child goes on by itself. May be repeated."""
        if self.fd < 0:
            return
        with contextlib.suppress(OSError):
            self._signal(False)
        os.close(self.fd)
        os.close(self._writer)
        self.fd = self._writer = -1

    def _signal(self, on: bool) -> None:
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_ASYNC
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_ASYNC * on)
