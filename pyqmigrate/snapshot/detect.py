"""Open a snapshot of whichever kind: it is looked at, its name does not matter.

with open_snapshot("/var/lib/libvirt/save/guest") as snapshot:
    print(snapshot.format, snapshot.machine, snapshot.libvirt is not None)
"""

from __future__ import annotations

import os

from pyqmigrate.argument_types import check
from pyqmigrate.enums import Format
from pyqmigrate.errors import NotSupported
from pyqmigrate.format.cursor import Cursor
from pyqmigrate.format.stream import configuration
from pyqmigrate.format.stream.mapped_ram import ByteOrder
from pyqmigrate.format.stream.wire import MAGIC, PREAMBLE, TYPE_CONFIGURATION, VERSION
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Located, Snapshot, locate
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot, check_bitmap_order
from pyqmigrate.snapshot.sequential import SequentialSnapshot

__all__ = ["open_snapshot"]

_MULTIFD_MAGIC = bytes.fromhex("11223344")


def open_snapshot(
    target: Target | Located,
    *,
    offset: int | None = None,
    bitmap_order: ByteOrder | None = None,
    page_size: int | None = None,
    index: str | os.PathLike[str] | None = None,
    piped: bool = False,
) -> Snapshot:
    """Open a mapped-ram file or a sequential stream: in a file or on a block device, behind libvirt's
    header or at an offset, compressed or not.

    bitmap_order: for a mapped-ram file, see
        :class:`~pyqmigrate.snapshot.mapped_ram.MappedRamSnapshot`.
    page_size, index: for a sequential stream, see
        :class:`~pyqmigrate.snapshot.sequential.SequentialSnapshot`.
    piped: whether a pipe will do, which is a sequential stream that passes by once: it can be
        converted, unpacked or loaded. Until it has passed it does not tell its description, so
        that ``page_size`` is needed where the configuration does not tell it and it is not 4096.

    A stream that is compressed (gzip, bzip2, xz, zstd), as a file or in an image of libvirt's, is
    decompressed each time that it is read; its pages cannot be read at random either.

    Raises SnapshotError for what is not a whole snapshot, NotSupported for one of a kind that
    cannot be read (compressed with lzop, a multifd channel) and for a file of another kind that is
    known (a disk image, an ELF core), TargetError, UsageError.
    """
    check_bitmap_order(bitmap_order)
    check("page_size", page_size, int, type(None))
    check("index", index, str, os.PathLike, type(None))
    located = locate(target, offset, piped=piped)
    try:
        kind = _kind(located.source)
        if kind is Format.MAPPED_RAM and located.source.passing:
            raise NotSupported(
                f"a mapped-ram file has its pages at fixed places, and {located.source.name!r} is "
                "read front to back: put it into a file, decompressed"
            )
    except BaseException:
        located.source.close()
        raise
    if kind is Format.MAPPED_RAM:
        return MappedRamSnapshot(located, bitmap_order=bitmap_order)
    return SequentialSnapshot(located, page_size=page_size, index=index)


def _kind(source: InputFile) -> Format:
    """From the capabilities at the start; what is no stream is refused by who parses it."""
    head = source.read_at(source.offset, PREAMBLE.size)
    if head.startswith(_MULTIFD_MAGIC):
        raise NotSupported("a multifd channel: only some pages of a guest, and no device state")
    if len(head) < PREAMBLE.size or PREAMBLE.unpack(head) != (MAGIC, VERSION, TYPE_CONFIGURATION):
        return Format.SEQUENTIAL if source.passing else Format.MAPPED_RAM
    settings = configuration.read(Cursor(source, source.offset + PREAMBLE.size))
    mapped = configuration.MAPPED_RAM in settings.capabilities
    return Format.MAPPED_RAM if mapped else Format.SEQUENTIAL
