"""Device state in a file of its own: what QEMU's ``xen-save-devices-state`` writes.

::

    "QEVM", u32 version = 3
    FULL sections
    0x00

The elements are those of any stream (:mod:`~pyqmigrate.format.stream.wire`), but there is neither a
configuration nor RAM, and no description: where a section ends is found by its footer, by what
follows it, and in the end by the walk's arriving at the end of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.cursor import ByteSource
from pyqmigrate.format.stream.configuration import Configuration
from pyqmigrate.format.stream.reader import Walk
from pyqmigrate.format.stream.wire import MAGIC, VERSION, Section, SectionKind

__all__ = ["HEADER", "HEADER_LENGTH", "InMemory", "walk_devices"]

_HEADER = struct.Struct(">4sI")  # magic, version
HEADER = _HEADER.pack(MAGIC, VERSION)
HEADER_LENGTH = len(HEADER)


def walk_devices(
    source: ByteSource, lengths: Mapping[tuple[str, int], int] | None = None
) -> tuple[Section, ...]:
    """The sections of the file, all of them FULL, in their order.

    They stand from HEADER_LENGTH on without gaps; the end-of-stream byte is the file's last.
    ``lengths`` are those of bodies, by name and instance, where a description tells them; each is
    tried before its footer is searched.
    Raises :class:`SnapshotError` when that is not so: it is another file, or was cut.
    """
    return _DeviceWalk(source, lengths or {}).devices()


class InMemory:
    """FULL sections in memory, one after another, as a file of devices alone."""

    def __init__(self, sections: bytes) -> None:
        self._data = HEADER + sections + b"\0"

    @property
    def size(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]

    @staticmethod
    def place(section: Section) -> slice:
        """Where the body of a section is in the bytes that were given."""
        start = section.body_offset - HEADER_LENGTH
        return slice(start, start + section.body_length)


class _DeviceWalk(Walk):
    """A walk over a file without configuration, RAM and description."""

    def __init__(self, source: ByteSource, lengths: Mapping[tuple[str, int], int]) -> None:
        super().__init__(source, 0)
        self._configuration = Configuration("")
        self._described = None
        self._lengths = dict(lengths)
        self._device_names = set()
        self._ram_end = 0  # there is none to wait for

    def devices(self) -> tuple[Section, ...]:
        cursor = self._cursor
        magic, version = _HEADER.unpack(cursor.take(HEADER_LENGTH, "the header"))
        if (magic, version) != (MAGIC, VERSION):
            raise SnapshotError(
                f"not device state: it starts with {magic!r}, version {version}", offset=0
            )
        again = next(self._find(HEADER, HEADER_LENGTH), None)
        if again is not None:
            raise SnapshotError("device state was written there a second time", offset=again)
        for section in self._elements:
            if section.kind is not SectionKind.FULL:
                raise SnapshotError(
                    f"a {section.kind.name} of {section.name!r} among device state",
                    offset=section.offset,
                )
        if self._opaque or cursor.position != cursor.size:
            what = "no section ends" if self._opaque else "device state ends, the file does not,"
            raise SnapshotError(
                f"{what} after this place: it was cut short, or is not device state alone",
                offset=cursor.position,
            )
        return tuple(self._sections)

    def _check_kind(self) -> None:
        """There is no configuration."""

    def _read_blocks(self, page_size: int | None) -> None:
        raise SnapshotError("a list of RAM blocks among device state", offset=self._cursor.position)

    def _read_pages(self) -> None:
        raise SnapshotError("RAM among device state", offset=self._cursor.position)
