"""A child process that is killed when this process ends, for whatever reason, until released.

The child inherits the reading end of a pipe, and only this process has the writing end. When that
is closed, the kernel sends a signal to the pipe's owner, which is the child (``F_SETOWN``,
``O_ASYNC``). Unlike ``PR_SET_PDEATHSIG``, this is tied to the process, not to a thread, and this
process can cancel it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal

__all__ = ["Lifeline"]


class Lifeline:
    """Pass ``fd`` on to the child, then :meth:`hold` it. Closing it releases the child."""

    def __init__(self) -> None:
        self.fd, self._writer = os.pipe2(os.O_CLOEXEC)

    def hold(self, pid: int) -> None:
        """Have the kernel send SIGKILL to process ``pid`` when this process ends."""
        fcntl.fcntl(self.fd, fcntl.F_SETOWN, pid)
        fcntl.fcntl(self.fd, fcntl.F_SETSIG, signal.SIGKILL)
        self._signal(True)

    def close(self) -> None:
        """Release the child. Idempotent."""
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
