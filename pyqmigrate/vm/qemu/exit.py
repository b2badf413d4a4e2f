"""The end of a process that need not be a child of ours."""

from __future__ import annotations

import asyncio
import contextlib
import os

__all__ = ["ProcessExit"]


class ProcessExit:
    """The end of a process that is there now; close it.

    ``known`` is false where it cannot be waited for: a kernel without pidfds, or no number.
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
        """Whether it came within ``timeout`` seconds, or in the end. A zombie has ended."""
        if self._fd < 0:
            return self._ended
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._fd, ended.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await ended.wait()
        finally:
            loop.remove_reader(self._fd)
        return ended.is_set()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
