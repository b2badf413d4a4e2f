"""Wait for any process to exit, child or not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

__all__ = ["ProcessExit"]


class ProcessExit:
    """The exit of a running process, held by a pidfd; close it.

    ``known`` is false where it cannot be waited for: a kernel without pidfds, or no pid.
    """

    def __init__(self, pid: int | None) -> None:
        self._fd = -1
        self._ended = False
        try:
            self._fd = -1 if pid is None else os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended = True
        except OSError:
            pass

    @property
    def known(self) -> bool:
        return self._ended or self._fd >= 0

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait; return whether it came within ``timeout`` seconds. A zombie has exited."""
        if self._fd < 0:
            return self._ended
        loop = asyncio.get_running_loop()
        exited = asyncio.Event()
        loop.add_reader(self._fd, exited.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await exited.wait()
        finally:
            loop.remove_reader(self._fd)
        return exited.is_set()

    def kill(self) -> None:
        """Send SIGKILL to this process, and to no other that has its number by now."""
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
