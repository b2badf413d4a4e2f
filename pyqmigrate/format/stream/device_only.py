"""Device state in a file of its own, as QEMU's ``xen-save-devices-state`` writes it.

::

    "QEVM", u32 version = 3
    FULL sections
    0x00

The elements are those of any stream (:mod:`~pyqmigrate.format.stream.wire`), but there is neither a
configuration nor RAM nor a description. The end of a section is found by its footer, by the element
after it, and finally because the last element ends at the end of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.cursor import ByteSource, Cursor
from pyqmigrate.format.stream.elements import ElementReader
from pyqmigrate.format.stream.wire import MAGIC, VERSION, Section, SectionKind

__all__ = ["HEADER", "HEADER_LENGTH", "SectionBuffer", "read_device_sections"]

_HEADER = struct.Struct(">4sI")  # magic, version
HEADER = _HEADER.pack(MAGIC, VERSION)
HEADER_LENGTH = len(HEADER)


def read_device_sections(
    source: ByteSource, lengths: Mapping[tuple[str, int], int] | None = None
) -> tuple[Section, ...]:
    """Return the sections of the file, all of them FULL, in order.

    They follow each other without gaps from HEADER_LENGTH on; the file's last byte is the
    end-of-stream byte. ``lengths`` are lengths of bodies by name and instance, where a description
    gives them; each is tried before its footer is searched for.

    Raises :class:`SnapshotError` for another kind of file, or one that was cut short.
    """
    cursor = Cursor(source, 0)
    magic, version = _HEADER.unpack(cursor.take(HEADER_LENGTH, "the header"))
    if (magic, version) != (MAGIC, VERSION):
        raise SnapshotError(
            f"not device state: it starts with {magic!r}, version {version}", offset=0
        )

    def refuse_ram(is_start: bool, offset: int) -> None:
        raise SnapshotError("a RAM section among device state", offset=offset)

    elements = ElementReader(source, cursor, refuse_ram)
    elements.expect_lengths(dict(lengths or {}))
    second_header = next(elements.find(HEADER, HEADER_LENGTH), None)
    if second_header is not None:
        raise SnapshotError("device state was written here a second time", offset=second_header)
    for section in elements:
        if section.kind is not SectionKind.FULL:
            raise SnapshotError(
                f"a {section.kind.name} of {section.name!r} among device state",
                offset=section.offset,
            )
    if elements.opaque or cursor.position != cursor.size:
        what = "no section ends" if elements.opaque else "device state ends, the file does not,"
        raise SnapshotError(
            f"{what} after this offset: it was cut short, or is not device state alone",
            offset=cursor.position,
        )
    return tuple(elements.sections)


class SectionBuffer:
    """FULL sections in memory, one after another, as a source of device state alone."""

    def __init__(self, sections: bytes) -> None:
        self._data = HEADER + sections + b"\0"

    @property
    def size(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]

    @staticmethod
    def body_of(section: Section) -> slice:
        """Return the position of a section's body in the bytes that were given."""
        start = section.body_offset - HEADER_LENGTH
        return slice(start, start + section.body_length)
