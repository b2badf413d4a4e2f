"""Memory of a block in two layers: changed pages above what they were changed from."""

from __future__ import annotations

from pyqmigrate.core import MemorySource
from pyqmigrate.errors import UsageError
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.in_use import FileId
from pyqmigrate.io.memory import SnapshotMemory

__all__ = ["buffer_memory", "layered"]


def layered(
    upper: SnapshotMemory, lower: SnapshotMemory, in_upper: Bitmap, page_size: int
) -> SnapshotMemory:
    """Return memory whose pages are those of ``upper`` where ``in_upper`` has a bit, else those of
    ``lower``.

    Both have the same length (bytes), whole pages of ``page_size``. The result keeps them and the
    bitmap alive; do not close them before it is no longer used. Raises UsageError if the lengths
    differ.
    """
    if upper.length != lower.length:
        raise UsageError(f"the layers have {upper.length} and {lower.length} bytes")
    if in_upper.npages * page_size != upper.length:
        raise UsageError(f"a bitmap of {in_upper.npages} pages for {upper.length} bytes")
    return SnapshotMemory(
        upper.length,
        min(upper.length, lower.extent_bytes + in_upper.count() * page_size),
        upper.identity,
        MemorySource.layered(upper.source, lower.source, in_upper, in_upper.npages, page_size),
        (*upper.others, lower.identity, *lower.others),
    )


def buffer_memory(buffer: object, identity: FileId) -> SnapshotMemory:
    """Return a buffer as a layer. It is exported until the result is dropped."""
    source, length = MemorySource.buffer(buffer)
    return SnapshotMemory(length, length, identity, source)
