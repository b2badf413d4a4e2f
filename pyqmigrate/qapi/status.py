"""The states of a migration and of a guest, and the replies about them, in QEMU's terms.

Outgoing::

    none -> setup -> active -> [pre-switchover ->] device -> completed
    any of setup, active, pre-switchover, device -> [failing ->] failed
    any of setup, active, pre-switchover, device -> cancelling -> cancelled

A new one may begin in none, completed (once the guest has left postmigrate), failed and
cancelled. Incoming::

    none -> setup -> active -> completed | failed
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["MigrationInfo", "RamStatistics", "RunState", "Status"]


class Status(StrEnum):
    """Every status that QEMU 10.0 and 11.1 know; a file migration goes through some of them only.
    ``failing`` and ``postcopy-device`` are 11.1's."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILING = "failing"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"

    @property
    def running(self) -> bool:
        """Whether a migration is under way."""
        return self not in _AT_REST

    @property
    def moving(self) -> bool:
        """Whether query-migrate shows numbers that still change."""
        return self in _MOVING


_AT_REST = {Status.NONE, Status.COMPLETED, Status.FAILED, Status.CANCELLED}
_MOVING = {Status.ACTIVE, Status.PRE_SWITCHOVER, Status.DEVICE, Status.CANCELLING}


class RunState(StrEnum):
    """The run state of a guest."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class RamStatistics:
    """The numbers of an outgoing migration's RAM.

    Bytes: ``transferred``, ``remaining`` (of the current pass), ``total`` (all blocks),
    ``normal_bytes``, ``multifd_bytes``, ``precopy_bytes``, ``downtime_bytes``, ``page_size``.
    Pages: ``duplicate`` (zero ones), ``normal`` (written, rewrites included). ``mbps`` is in
    megabits a second.
    """

    total: int = 0
    remaining: int = 0
    transferred: int = 0
    duplicate: int = 0
    normal: int = 0
    normal_bytes: int = 0
    page_size: int = 4096
    mbps: float = 0.0
    dirty_pages_rate: int = 0
    dirty_sync_count: int = 0
    multifd_bytes: int = 0
    pages_per_second: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0

    def to_json(self) -> dict[str, object]:
        """Return the ``ram`` member of query-migrate."""
        return {
            "total": self.total,
            "postcopy-requests": 0,
            "dirty-sync-count": self.dirty_sync_count,
            "multifd-bytes": self.multifd_bytes,
            "pages-per-second": self.pages_per_second,
            "downtime-bytes": self.downtime_bytes,
            "page-size": self.page_size,
            "remaining": self.remaining,
            "postcopy-bytes": 0,
            "mbps": self.mbps,
            "transferred": self.transferred,
            "dirty-sync-missed-zero-copy": 0,
            "precopy-bytes": self.precopy_bytes,
            "duplicate": self.duplicate,
            "dirty-pages-rate": self.dirty_pages_rate,
            "normal-bytes": self.normal_bytes,
            "normal": self.normal,
        }


@dataclass(frozen=True, slots=True)
class MigrationInfo:
    """One moment of a migration; times are in milliseconds. ``ram`` is None on a load."""

    status: Status = Status.NONE
    error: str = ""
    ram: RamStatistics | None = None
    total_time: int = 0
    setup_time: int = 0
    downtime: int = 0
    expected_downtime: int = 0

    def to_json(self, *, total_remaining: bool = False) -> dict[str, object]:
        """Return the reply of query-migrate: nothing before the first migration, numbers while
        one runs and when it has completed, the status alone otherwise. ``total_remaining`` adds
        what remains of everything, as QEMU 11.1 does."""
        if self.status is Status.NONE:
            return {}
        shown: dict[str, object] = {"status": self.status}
        if self.error:
            shown["error-desc"] = self.error
        if self.ram is None or not (self.status.moving or self.status is Status.COMPLETED):
            return shown
        shown["total-time"] = self.total_time
        shown["setup-time"] = self.setup_time
        if self.status is Status.COMPLETED:
            shown["downtime"] = self.downtime
        else:
            shown["expected-downtime"] = self.expected_downtime
            if total_remaining:
                shown["remaining"] = self.ram.remaining
        shown["ram"] = self.ram.to_json()
        return shown
