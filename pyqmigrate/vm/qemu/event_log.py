"""What QEMU reports by itself while a guest is saved: stops, resumes, and a migration's progress.

Asking (``query-migrate``) finds out late that something has happened, by as long as the pause
between two questions and by as long as QEMU takes to answer, which is longest when a migration
ends. Events come at once and carry the time at which they happened.
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
        self._stood: int | None = None
        self._stands = False
        self._resumed = False

    def close(self) -> None:
        self._stack.close()

    async def migration(self, timeout: float) -> str | None:
        """Wait for a migration's status to change, at most ``timeout`` seconds; the new status, or
        None."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    event = cast("Mapping[str, Any]", await self._listener.get())
                    self._note(event)
                    if event["event"] == _MIGRATION:
                        return str(event["data"]["status"])
        return None

    def downtime(self, at_most: float) -> float | None:
        """How long the guest stood still before it went on last, in seconds.

        None where no stop, or no resume after it, was reported, or the host's clock was changed
        meanwhile: it took longer than ``at_most`` seconds by that, or less than none.
        """
        self._catch_up()
        if self._stood is None:
            return None
        seconds = self._stood / _MICROSECONDS
        return seconds if 0 <= seconds <= at_most else None

    def stands(self) -> None:
        """Say that the guest stands still, and is to stand until :meth:`resumed` is asked. The
        first time counts."""
        self._catch_up()
        if not self._stands:
            self._stands = True
            self._resumed = self._stopped_at is not None and self._stood is not None

    def resumed(self) -> bool:
        """Whether somebody has let the guest run since :meth:`stands`, by the events up to now."""
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
            self._stopped_at, self._stood = happened_at, None
        elif event["event"] == _RESUME:
            self._resumed = True
            if self._stopped_at is not None:
                self._stood = happened_at - self._stopped_at
