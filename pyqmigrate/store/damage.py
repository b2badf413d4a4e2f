"""What is damaged in a store, as an error that names it."""

from __future__ import annotations

from pyqmigrate.errors import DamagedContent

__all__ = ["DamagedPack"]


class DamagedPack(DamagedContent):
    """A pack of a store is damaged, missing, or not what its snapshot needs; errno is EIO.

    ``pack`` is its digest; ``frame`` and ``page`` are numbers in it, None if all of it is concerned.
    """

    def __init__(
        self,
        why: str,
        pack: bytes,
        frame: int | None = None,
        page: int | None = None,
        *,
        snapshot: str | None = None,
        store: str | None = None,
    ) -> None:
        self.why, self.pack, self.frame, self.page = why, pack, frame, page
        self.snapshot, self.store = snapshot, store
        where = [f"pack {pack.hex()}"]
        where += [] if frame is None else [f"frame {frame}"]
        where += [] if page is None else [f"page {page}"]
        front = "" if snapshot is None else f"snapshot {snapshot!r}: "
        super().__init__(f"{front}{', '.join(where)}: {why}", store)

    def of(self, snapshot: str) -> DamagedPack:
        """Return the error with the name of the snapshot in which the pack was read."""
        return DamagedPack(
            self.why, self.pack, self.frame, self.page, snapshot=snapshot, store=self.store
        )
