"""Memory for a migration, and a recorder of its events."""

from __future__ import annotations

import mmap

from pyqmigrate.migration import Migration
from pyqmigrate.qapi.event import Event

__all__ = ["LENGTH", "PAGE", "Recorder", "memory"]

LENGTH = 8 << 20
PAGE = 4096


def memory(length: int = LENGTH) -> mmap.mmap:
    ram = mmap.mmap(-1, length)
    for page in range(0, length // PAGE, 3):
        ram[page * PAGE : page * PAGE + 8] = page.to_bytes(4, "big") + b"data"
    return ram


class Recorder:
    """Names of events, statuses for MIGRATION and pass numbers for MIGRATION_PASS."""

    def __init__(self, migration: Migration) -> None:
        self.seen: list[str] = []
        migration.set_capabilities({"events": True})
        migration.subscribe(self._note)

    def _note(self, event: Event) -> None:
        data = event.data or {}
        self.seen.append(
            str(data.get("status") or (f"PASS {data['pass']}" if "pass" in data else event.name))
        )
