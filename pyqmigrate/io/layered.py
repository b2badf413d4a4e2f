"""Memory of a block in two layers: changed pages above what they were changed from."""

from __future__ import annotations

from pyqmigrate import _core
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

    Both have the same length (bytes), whole pages of ``page_size``. They, and the bitmap, are kept
    alive by the result; close none of them before it is done with. Raises UsageError when the
    lengths differ.
    """
    if upper.length != lower.length:
        raise UsageError(f"layers of {upper.length} and {lower.length} bytes do not fit")
    if in_upper.npages * page_size != upper.length:
        raise UsageError(f"a bitmap of {in_upper.npages} pages for {upper.length} bytes")
    core = _core.ffi.new("struct qm_layered *")
    core.upper, core.npages, core.page_size = in_upper.core, in_upper.npages, page_size
    core.upper_fill, core.upper_next, core.upper_arg = upper.fill, upper.next, upper.argument
    core.lower_fill, core.lower_next, core.lower_arg = lower.fill, lower.next, lower.argument
    return SnapshotMemory(
        upper.length,
        min(upper.length, lower.extent_bytes + in_upper.count() * page_size),
        upper.identity,
        _core.ffi.addressof(_core.lib, "qm_layered_fill"),
        _core.ffi.addressof(_core.lib, "qm_layered_next"),
        core,
        (upper, lower, in_upper),
    )


def buffer_memory(buffer: object, identity: FileId) -> SnapshotMemory:
    """Return a buffer as a layer. It is exported until the result is dropped."""
    view = _core.ffi.from_buffer("unsigned char[]", buffer)
    return SnapshotMemory(
        len(view),
        len(view),
        identity,
        _core.ffi.addressof(_core.lib, "qm_buffer_fill"),
        _core.ffi.addressof(_core.lib, "qm_buffer_next"),
        view,
        buffer,
    )
