"""The verb ``info`` of a fleet run: the facts of each snapshot, for a table."""

from __future__ import annotations

import contextlib
import uuid

from pyqmigrate.fleet.finding import Finding
from pyqmigrate.fleet.opening import Poll, open_copy
from pyqmigrate.fleet.partial_copy import PartialCopy
from pyqmigrate.fleet.target import file_identity
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.snapshot.provenance import provenance

__all__ = ["describe_file", "describe_shown"]


def describe_file(path: str, poll: Poll) -> Finding:
    """Describe a local file. Raises SnapshotError, NotSupported, TargetError, and what ``poll``
    raises."""
    with open_snapshot(path) as snapshot:
        finding = _describe(snapshot, poll)
        finding.data["bytes_allocated"] = snapshot.allocated
        if isinstance(snapshot, IncrementSnapshot):
            base = snapshot.base.source.name
            finding.data["base"] = base
            finding.depends[base] = file_identity(base)
    return finding


def describe_shown(plain: PlainFile, name: str, poll: Poll) -> Finding:
    """Describe an object or a stored snapshot, of which only the framing is read. Raises the errors
    of :func:`describe_file`."""
    with contextlib.closing(PartialCopy(plain, name)) as copy:
        snapshot, increment = open_copy(copy)
        with snapshot:
            finding = _describe(snapshot, poll)
    if increment:
        finding.data["kind"] = "increment"
    return finding


def _describe(snapshot: Snapshot, poll: Poll) -> Finding:
    stream = snapshot.read_through(lambda _: poll())
    blocks = [block for block in snapshot.blocks.values() if not block.external]
    finding = Finding()
    finding.data |= {
        "kind": str(snapshot.format),
        "machine": snapshot.machine,
        "uuid": None if stream.uuid is None else str(uuid.UUID(bytes=stream.uuid)),
        "file_size": snapshot.size,
        "bytes_allocated": None,
        "total_ram": stream.total_ram,
        "block_count": len(snapshot.blocks),
        "data_pages": sum(block.data_pages for block in blocks),
        "zero_pages": sum(block.zero_pages for block in blocks),
        "complete": stream.complete,
        "loadable": provenance(snapshot).loadable,
    }
    return finding
