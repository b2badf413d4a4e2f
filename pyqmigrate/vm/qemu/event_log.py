"""QEMU's events while a guest is saved: stops, resumes, and a migration's progress.

Polling ``query-migrate`` notices a change late, by the polling interval and by the time that QEMU
takes to answer, which is longest when a migration ends. Events come at once, with a timestamp.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, cast

from pyqmigrate.vm.qemu.monitor import Monitor

__all__ = ["EventLog"]

_STOP, _RESUME, _MIGRATION = "STOP", "RESUME", "MIGRATION"
_MICROSECONDS = 1_000_000


class EventLog:
    """Events from now on; close it.

    QEMU reports MIGRATION only while its capability ``events`` is on.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._stack = contextlib.ExitStack()
        self._listener = self._stack.enter_context(monitor.listener((_STOP, _RESUME, _MIGRATION)))
        self._stopped_at: int | None = None
        self._downtime: int | None = None
        self._pauses: list[tuple[int, int | None]] = []
        self._marked = False
        self._resumed = False

    def close(self) -> None:
        self._stack.close()

    async def migration(self, timeout: float) -> str | None:
        """Wait at most ``timeout`` seconds for a new migration status; return it, or None."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    event = cast("Mapping[str, Any]", await self._listener.get())
                    self._note(event)
                    if event["event"] == _MIGRATION:
                        return str(event["data"]["status"])
        return None

    def downtime(self, at_most: float) -> float | None:
        """Return the seconds from the last reported stop to the resume after it.

        None if there was no such pair, or if the host's clock was changed in between: a negative
        time, or more than ``at_most`` seconds.
        """
        self._catch_up()
        if self._downtime is None:
            return None
        seconds = self._downtime / _MICROSECONDS
        return seconds if 0 <= seconds <= at_most else None

    def pauses(self) -> list[tuple[float, float | None]]:
        """Return the start and the end of each pause, in seconds since 1970 by the host's clock; the
        end of one that is not over is None."""
        self._catch_up()
        return [
            (start / _MICROSECONDS, None if end is None else end / _MICROSECONDS)
            for start, end in self._pauses
        ]

    def mark_stopped(self) -> None:
        """Note that the guest is stopped, for :meth:`resumed`. Only the first call counts."""
        self._catch_up()
        if not self._marked:
            self._marked = True
            self._resumed = self._stopped_at is not None and self._downtime is not None

    def resumed(self) -> bool:
        """Return whether the guest was resumed since :meth:`mark_stopped`, by the events so far."""
        self._catch_up()
        return self._resumed

    def _catch_up(self) -> None:
        while not self._listener.empty():
            for event in self._listener.clear():
                self._note(event)

    def _note(self, event: Mapping[str, Any]) -> None:
        time = event["timestamp"]
        happened_at = time["seconds"] * _MICROSECONDS + time["microseconds"]
        if event["event"] == _STOP:
            self._stopped_at, self._downtime = happened_at, None
            if not self._pauses or self._pauses[-1][1] is not None:
                self._pauses.append((happened_at, None))
        elif event["event"] == _RESUME:
            self._resumed = True
            if self._pauses and self._pauses[-1][1] is None:
                self._pauses[-1] = self._pauses[-1][0], happened_at
            if self._stopped_at is not None:
                self._downtime = happened_at - self._stopped_at
