"""Pages that cannot be read: the guest waits at them, and they are tried again from time to time."""

from __future__ import annotations

import time

from pyqmigrate.page_server.reading import Read

__all__ = ["Withheld"]

RETRY = 5.0  # seconds until pages are tried again for the first time
RETRY_MAX = 60.0
_PAGES_MAX = 1 << 16


class Withheld:
    """The pages of one connection. ``named`` are those that were reported, kept from the last one."""

    def __init__(self, named: set[tuple[int, int]]) -> None:
        self._reads: dict[tuple[int, int], Read] = {}
        self.named = named
        self._retry_at, self._retry_after = 0.0, RETRY

    def __len__(self) -> int:
        return len(self._reads)

    @property
    def full(self) -> bool:
        """Whether there are so many that nothing more should be read ahead."""
        return len(self._reads) >= _PAGES_MAX

    @property
    def retry_at(self) -> float | None:
        """When to try again, in seconds of the monotonic clock."""
        return self._retry_at if self._reads else None

    def add(self, read: Read) -> bool:
        """Add pages that cannot be read; return whether that was not reported yet."""
        key = (read.block, read.first)
        known = self._reads.get(key)
        if known is None or (read.demand and not known.demand):
            self._reads[key] = read
        if len(self._reads) == 1:
            self._retry_at = time.monotonic() + self._retry_after
        if key in self.named:
            return False
        self.named.add(key)
        return True

    def drop(self, read: Read) -> None:
        """Take back pages that were read after all."""
        if self._reads:
            self._reads.pop((read.block, read.first), None)

    def due(self) -> list[Read]:
        """Return what has to be read again now; the next time is later."""
        now = time.monotonic()
        if not self._reads or now < self._retry_at:
            return []
        self._retry_after = min(self._retry_after * 2, RETRY_MAX)
        self._retry_at = now + self._retry_after
        return list(self._reads.values())
