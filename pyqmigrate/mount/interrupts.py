"""Reads whose process is killed: they are answered at once, so that it can end.

The kernel waits for the answer to a request that the worker has, whatever happens to the process that
reads. A signal makes it send INTERRUPT once, and only for SIGKILL may the answer be EINTR: a page fault
that fails with EINTR would be a SIGBUS for a guest that merely got a signal. So the thread that waits
is looked at until it has its answer, or dies.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable

from pyqmigrate.mount.protocol import RESENT

__all__ = ["Interrupts", "is_dying"]

_INTERVAL = 0.1  # seconds between looks
_KILLED = 1 << signal.SIGKILL - 1


class Interrupts:
    """The requests that are being served. ``abandon`` answers one with EINTR; ``unique`` names it."""

    def __init__(self, abandon: Callable[[int], None]) -> None:
        self._abandon = abandon
        self._waiting: dict[int, tuple[int, int]] = {}  # unique without RESENT: unique, thread
        self._interrupted: set[int] = set()
        self._changed = threading.Condition()
        self._watcher: threading.Thread | None = None

    def begin(self, unique: int, pid: int) -> None:
        self._waiting[unique & ~RESENT] = unique, pid

    def end(self, unique: int) -> None:
        del self._waiting[unique & ~RESENT]

    def interrupt(self, unique: int) -> bool:
        """Answer a request once its thread dies. Return False if it is not being served."""
        unique &= ~RESENT
        if unique not in self._waiting:
            return False
        with self._changed:
            self._interrupted.add(unique)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, daemon=True)
                self._watcher.start()
            self._changed.notify()
        return True

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not self._interrupted:
                    self._changed.wait()
                looked_at = list(self._interrupted)
            for unique in looked_at:
                waiting = self._waiting.get(unique)
                if waiting is not None and not is_dying(waiting[1]):
                    continue
                with self._changed:
                    self._interrupted.discard(unique)
                if waiting is not None:
                    self._abandon(waiting[0])
            threading.Event().wait(_INTERVAL)


def is_dying(thread: int) -> bool:
    """Return whether a thread has been killed, or is gone. One that cannot be seen (0) is alive."""
    if not thread:
        return False
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key == "State" and value.split()[0] in ("Z", "X"):
                    return True
                if key in ("SigPnd", "ShdPnd") and int(value, 16) & _KILLED:
                    return True
        return False
    return True
