"""The identity of a snapshot, as recorded in files beside it and in increments of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SnapshotId"]


@dataclass(frozen=True)
class SnapshotId:
    """The identity of a snapshot's file: ``size`` in bytes; ``mtime_ns``, when it was last modified, in
    nanoseconds since 1970; ``seal``, the 16 bytes of its seal's digest, or None without one."""

    size: int
    mtime_ns: int
    seal: bytes | None = None

    def differs_from(self, found: SnapshotId) -> str | None:
        """Return how the file ``found`` differs from this one, for a message; None if it does not.

        If both have a seal, the seals decide: a copy of a file has another modification time.
        """
        if found.size != self.size:
            return f"it has {found.size} bytes, and had {self.size}"
        if found.seal is not None and self.seal is not None:
            return None if found.seal == self.seal else "it has another seal"
        if found.mtime_ns != self.mtime_ns:
            return "it was modified since"
        return None
