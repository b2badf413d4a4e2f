"""Snapshots whose pages can be read in any order."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator

from pyqmigrate.export.convert import convert
from pyqmigrate.io.job import Progress
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import open_snapshot

__all__ = ["random_access"]

_SCRATCH = "/var/tmp"  # unless TMPDIR says otherwise: /tmp is often in memory


@contextlib.contextmanager
def random_access(
    snapshot: Snapshot, progress: Callable[[Progress], object] | None
) -> Iterator[Snapshot]:
    """Make the snapshot ready for random reads; one that is read front to back (compressed, or from a
    pipe) is unpacked into an unnamed file in TMPDIR, or /var/tmp.

    Raises SnapshotError, NotSupported, TargetError, Cancelled.
    """
    if not snapshot.source.forward:
        snapshot.prepare_random_reads(progress)
        yield snapshot
        return
    with tempfile.TemporaryFile(dir=os.environ.get("TMPDIR") or _SCRATCH) as file:
        convert(snapshot, Descriptors(file.fileno()), to="mapped-ram", progress=progress)
        with open_snapshot(Descriptors(file.fileno())) as unpacked:
            yield unpacked
