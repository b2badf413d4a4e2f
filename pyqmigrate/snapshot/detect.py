"""Open a snapshot of any kind.

The kind of the file follows from its content, not from its name::

    with open_snapshot("/var/lib/libvirt/save/guest") as snapshot:
        print(snapshot.format, snapshot.machine, snapshot.libvirt is not None)
"""

from __future__ import annotations

import os

from pyqmigrate.argument_types import check
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.stream.configuration import MAPPED_RAM
from pyqmigrate.format.stream.mapped_ram import ByteOrder
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot, check_bitmap_order
from pyqmigrate.snapshot.sequential import SequentialSnapshot

__all__ = ["open_snapshot", "snapshot_of"]

_MULTIFD_MAGIC = bytes.fromhex("11223344")


def open_snapshot(
    target: Target,
    *,
    offset: int | None = None,
    bitmap_order: ByteOrder | None = None,
    page_size: int | None = None,
    index: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    allow_pipe: bool = False,
) -> Snapshot:
    """Open a mapped-ram file, a sequential stream or an increment: in a file or on a block device,
    behind libvirt's header or at an offset, compressed or not.

    target: a path, a ``file:`` URI or Descriptors (borrowed, open for reading).
    offset: where the stream starts, bytes, for a path. Without it libvirt's header is looked for at
        the start of the file.
    bitmap_order: for a mapped-ram file, see
        :class:`~pyqmigrate.snapshot.mapped_ram.MappedRamSnapshot`.
    page_size, index: for a sequential stream, see
        :class:`~pyqmigrate.snapshot.sequential.SequentialSnapshot`.
    base: the path of an increment's base, instead of the one that the increment records; see
        :class:`~pyqmigrate.snapshot.increment.IncrementSnapshot`. UsageError for another file.
    allow_pipe: whether the path of a pipe is accepted. It carries a sequential stream, which can be
        converted, unpacked or loaded once. Its description comes last, so ``page_size`` is needed
        if the configuration does not state it and it is not 4096.

    A compressed stream (gzip, bzip2, xz, zstd), as a file or in libvirt's image, is decompressed
    each time that it is read; its pages cannot be read at random.

    Raises SnapshotError for anything that is not a complete snapshot, NotSupported for a kind that
    cannot be read (compressed with lzop, a multifd channel) and for a file of another known kind
    (a disk image, an ELF core), TargetError, UsageError.
    """
    check_bitmap_order(bitmap_order)
    check("page_size", page_size, int, type(None))
    check("index", index, str, os.PathLike, type(None))
    check("base", base, str, os.PathLike, type(None))
    stream_file = StreamFile.open(target, offset=offset, allow_pipe=allow_pipe)
    return snapshot_of(
        stream_file, bitmap_order=bitmap_order, page_size=page_size, index=index, base=base
    )


def snapshot_of(
    stream_file: StreamFile,
    *,
    bitmap_order: ByteOrder | None = None,
    page_size: int | None = None,
    index: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Snapshot:
    """Return the snapshot in an open file, which it owns; the file is closed if this fails.

    Arguments and errors are those of :func:`open_snapshot`.
    """
    try:
        if base is not None and stream_file.increment is None:
            raise UsageError(
                f"{stream_file.source.name!r} is not an increment, and has no base: leave base out"
            )
        mapped_ram = _is_mapped_ram(stream_file)
    except BaseException:
        stream_file.close()
        raise
    if stream_file.increment is not None:
        from pyqmigrate.snapshot.increment import IncrementSnapshot

        return IncrementSnapshot(stream_file, base=base, bitmap_order=bitmap_order)
    if mapped_ram:
        return MappedRamSnapshot(stream_file, bitmap_order=bitmap_order)
    return SequentialSnapshot(stream_file, page_size=page_size, index=index)


def _is_mapped_ram(stream_file: StreamFile) -> bool:
    head = stream_file.source.read_at(stream_file.offset, len(_MULTIFD_MAGIC))
    if head == _MULTIFD_MAGIC:
        raise NotSupported("a multifd channel: only some pages of a guest, and no device state")
    return MAPPED_RAM in stream_file.configuration.capabilities
