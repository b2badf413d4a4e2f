"""Open a target that is not a local file: an object, or a stored snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.fleet.object_file import ObjectFile
from pyqmigrate.fleet.partial_copy import PartialCopy
from pyqmigrate.fleet.target import Kind, Target
from pyqmigrate.format.compression import MAGIC_MAX, Compression
from pyqmigrate.format.increment import MAGIC as INCREMENT_MAGIC
from pyqmigrate.format.increment import is_increment
from pyqmigrate.format.libvirt import MAGIC_LENGTH, is_libvirt
from pyqmigrate.format.stream.configuration import MAPPED_RAM
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.io.input import InputFile, Source
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import snapshot_of

__all__ = ["Poll", "is_snapshot", "is_snapshot_file", "open_copy", "open_plain"]

Poll = Callable[[], None]  # raises Cancelled when the run is to end

_HEAD = max(MAGIC_MAX, MAGIC_LENGTH, len(INCREMENT_MAGIC), len(MAGIC))


@contextlib.contextmanager
def open_plain(target: Target, poll: Poll) -> Iterator[PlainFile]:
    """Open an object or a stored snapshot as a file that is shown, for a ``with`` block.

    Raises TargetError, and SnapshotError for a damaged store, also where the block reads a damaged
    pack.
    """
    if target.kind is Kind.STORED:
        from pyqmigrate.store.store import Store

        with (
            contextlib.closing(Store.open(target.place)) as store,
            contextlib.closing(store.open_file(target.key)) as stored,
        ):
            yield stored
        return
    from pyqmigrate.store.place import open_place

    with contextlib.closing(open_place(target.place)) as place:
        file = ObjectFile(place, target.key, target.size, sealed=target.sealed, poll=poll)
        with contextlib.closing(file):
            yield file


def open_copy(copy: PartialCopy) -> tuple[Snapshot, bool]:
    """Open the snapshot in a partial copy, which it owns; the copy is closed if this fails.

    Return it, and whether it is an increment, of which only the increment itself is opened: its
    base is not looked for. What the parsers need is copied. Raises SnapshotError, NotSupported,
    TargetError.
    """
    stream_file = StreamFile.find(copy)
    increment = stream_file.increment is not None
    try:
        forward = stream_file.source.forward
        if not forward and MAPPED_RAM not in stream_file.configuration.capabilities:
            copy.fetch_all()  # page records are read by the descriptor
    except BaseException:
        stream_file.close()
        raise
    snapshot = snapshot_of(stream_file.without_header() if increment else stream_file)
    try:
        if not forward and MAPPED_RAM in stream_file.configuration.capabilities:
            if getattr(snapshot.stream, "background", False):
                copy.fetch_all()  # holes are its bitmaps
            for layout in snapshot.layouts:
                copy.fetch(layout.bitmap_offset, layout.bitmap_size)
    except BaseException:
        snapshot.close()
        raise
    return snapshot, increment


def is_snapshot_file(path: str) -> bool:
    """Return whether a local file looks like a snapshot. Raises TargetError."""
    with contextlib.closing(InputFile(path)) as source:
        return _looks_like_one(source)


def is_snapshot(plain: PlainFile, name: str) -> bool:
    """Return whether a file that is shown looks like a snapshot. Raises TargetError."""
    with contextlib.closing(PartialCopy(plain, name)) as copy:
        return _looks_like_one(copy)


def _looks_like_one(source: Source) -> bool:
    """Return whether it begins as a snapshot does; whatever is compressed is decompressed for that.
    The source may be closed then."""
    head = source.read_at(0, _HEAD)
    if Compression.of(head[:MAGIC_MAX]) is None:
        is_one = head.startswith(MAGIC) or is_increment(head)
        return is_one or is_libvirt(head[:MAGIC_LENGTH])
    try:
        with contextlib.closing(StreamFile.find(source)) as stream_file:
            return bool(stream_file.source.read_at(stream_file.offset, len(MAGIC)) == MAGIC)
    except (SnapshotError, NotSupported):
        return False
