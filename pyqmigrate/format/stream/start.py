"""The start of a stream: its preamble and its configuration, which says what form it has."""

from __future__ import annotations

from typing import NamedTuple

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.cursor import ByteSource, Cursor
from pyqmigrate.format.stream import configuration
from pyqmigrate.format.stream.configuration import Configuration
from pyqmigrate.format.stream.wire import MAGIC, PREAMBLE, TYPE_CONFIGURATION, VERSION

__all__ = ["StreamStart", "read_start"]


class StreamStart(NamedTuple):
    """The configuration of a stream, and the file offset of the element after it."""

    configuration: Configuration
    end: int


def read_start(source: ByteSource, offset: int) -> StreamStart:
    """Read the start of the stream at absolute ``offset`` (bytes).

    Raises SnapshotError for anything that is not a migration stream or is malformed, NotSupported
    for a configuration that is not known.
    """
    cursor = Cursor(source, offset)
    _read_preamble(cursor)
    settings = configuration.read(cursor)
    return StreamStart(settings, cursor.position)


def _read_preamble(cursor: Cursor) -> None:
    offset = cursor.position
    if offset < 0 or offset > cursor.size:
        raise SnapshotError("the stream starts past the end of the file", offset=offset)
    data = cursor.peek(PREAMBLE.size)
    if len(data) < PREAMBLE.size:
        raise SnapshotError(f"not a migration stream: it has only {len(data)} bytes", offset=offset)
    cursor.position += PREAMBLE.size
    magic, version, element_type = PREAMBLE.unpack(data)
    if magic == bytes(len(MAGIC)):
        raise SnapshotError(
            "the magic is zero: the save did not finish", offset=offset, field="magic"
        )
    if magic != MAGIC:
        raise SnapshotError(
            f"not a migration stream: it starts with {magic!r}, not {MAGIC!r}",
            offset=offset,
            field="magic",
        )
    if version != VERSION:
        raise SnapshotError(
            f"stream version {version}, but only {VERSION} is known",
            offset=offset + 4,
            field="version",
        )
    if element_type != TYPE_CONFIGURATION:
        raise SnapshotError(
            f"element {element_type:#04x} where the configuration must be", offset=offset + 8
        )
