"""Complete a background snapshot that QEMU wrote with mapped-ram.

QEMU puts each page into its place, and the device state behind them, but neither bitmaps nor RAM's
END (docs/internals/format.md, "Background snapshots"). A page that is not zero is written exactly
once into a file that was empty, so the pages with data are those that are not in a hole of the file.
RAM's last PART has no content but its end mark and becomes the END, which differs in its type only:
nothing moves, and the result is like any other mapped-ram file of QEMU's.
"""

from __future__ import annotations

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.stream.wire import RAM_NAME, Section, SectionKind, Stream
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot

__all__ = ["complete_background_snapshot"]


def complete_background_snapshot(target: OutputFile) -> int:
    """Write the bitmaps and RAM's END into an unpublished file; return the number of data pages.

    First it makes the pages durable: a file system finds extents that are not written back slowly.
    Raises SnapshotError if the file is not a whole background snapshot, NotSupported if a device has
    state in several parts, whose end QEMU left out, too; TargetError.
    """
    target.flush()
    with (
        target.opened_for_reading() as fd,
        MappedRamSnapshot(StreamFile.open(Descriptors(fd))) as snapshot,
    ):
        snapshot.verify()
        last_part = _last_part(snapshot.stream)
        pages = 0
        for block in snapshot.blocks.values():
            pages += block.data_pages
            block.bitmap.write_to(target, block.bitmap_offset, everything=False)
        target.write_at(last_part.offset, bytes([SectionKind.END.value]))
    return pages


def _last_part(stream: Stream) -> Section:
    """Return RAM's last PART, which the first device section follows."""
    if not stream.background:
        raise SnapshotError("QEMU wrote RAM's END, which a background snapshot does not have")
    for section in stream.sections:
        if section.kind is SectionKind.START and section.name != RAM_NAME:
            raise NotSupported(
                f"{section.name!r} has state in several parts, which a background snapshot leaves "
                "unfinished"
            )
    for section in stream.sections:
        if section.offset + section.length == stream.ram_end:
            if section.kind is SectionKind.PART and section.name == RAM_NAME:
                return section
            break
    raise SnapshotError(
        "the device state of a background snapshot does not follow RAM", offset=stream.ram_end
    )
