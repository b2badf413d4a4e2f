"""Errors that say which of two snapshots they are about."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["naming"]


@contextlib.contextmanager
def naming(snapshot: Snapshot | Target) -> Iterator[None]:
    """Add the name of the snapshot, as a note, to a SnapshotError or NotSupported of the body."""
    try:
        yield
    except (SnapshotError, NotSupported) as error:
        name = snapshot.source.name if isinstance(snapshot, Snapshot) else snapshot
        if isinstance(name, str | os.PathLike):
            error.add_note(f"{os.fsdecode(name)}: ")
        raise
