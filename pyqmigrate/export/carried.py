"""What a stream has besides RAM, copied byte for byte into another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyqmigrate.enums import Format
from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.stream.configuration import Configuration
from pyqmigrate.format.stream.description import HEADER_LENGTH as DESCRIPTION_HEADER
from pyqmigrate.format.stream.description import encode as encode_description
from pyqmigrate.format.stream.description import with_configuration
from pyqmigrate.format.stream.elements import PARTS_LISTED
from pyqmigrate.format.stream.sequential import SequentialStream
from pyqmigrate.format.stream.wire import RAM_NAME, Section, SectionKind, Stream
from pyqmigrate.format.stream.writer import (
    RAM_EOS,
    RAM_SECTION_ID,
    encode_part_header,
    encode_ram_end,
)
from pyqmigrate.io.input import Source

__all__ = ["Carried", "carried_of", "sections_before"]

_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Carried:
    """What a stream has besides RAM: ``before`` it, in the ``middle`` before its END, and ``after``
    that, as ranges of the file up to the end-of-stream byte; and its description's text, or None."""

    before: bytes
    middle: tuple[tuple[int, int], ...]
    after: tuple[int, int]
    description: bytes | None

    def tail(self, source: Source, to: Format, settings: Configuration) -> Iterator[bytes]:
        """Yield what follows the pages. In a mapped-ram file RAM's list and a PART end first."""
        if to is Format.MAPPED_RAM:
            yield RAM_EOS + encode_part_header() + RAM_EOS
        for start, end in self.middle:
            yield from _read(source, start, end)
        yield encode_ram_end()
        yield from _read(source, *self.after)
        if self.description is not None:
            yield encode_description(with_configuration(self.description, settings))


def _read(source: Source, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        data = source.read_at(start, min(_PIECE, end - start))
        if not data:
            raise SnapshotError("the file became shorter during the conversion", offset=start)
        yield data
        start += len(data)


def carried_of(
    source: Source, stream: Stream | SequentialStream, description: bytes | None
) -> Carried:
    """Return what a stream has besides RAM. ``description`` replaces the stream's own."""
    if not stream.complete:
        raise SnapshotError(
            "the end of the stream is missing: device state is cut off", offset=stream.end
        )
    ours = [s for s in stream.sections if _is_ram(s)]
    others = [s for s in stream.sections if not _is_ram(s)]
    if len(stream.sections) > PARTS_LISTED and any(s.kind is SectionKind.PART for s in others):
        raise NotSupported("too many sections of live devices to convert")
    start = ours[0]
    if any(section.section_id == RAM_SECTION_ID for section in others):
        raise NotSupported(f"another section than RAM's has the id {RAM_SECTION_ID}")
    own = stream.description_offset
    if description is None and own is not None:
        description = b"".join(_read(source, own + DESCRIPTION_HEADER, stream.end))
    return Carried(
        before=sections_before(source, stream.sections),
        middle=tuple(
            (s.offset, s.offset + s.length)
            for s in others
            if start.offset < s.offset < stream.ram_end
        ),
        after=(stream.after_ram, stream.end if own is None else own),
        description=description,
    )


def sections_before(source: Source, sections: Sequence[Section]) -> bytes:
    """Return the elements before RAM's first section."""
    before = list(itertools.takewhile(lambda section: not _is_ram(section), sections))
    if sum(s.length for s in before) > _PIECE:
        raise NotSupported("more than 1 MiB of sections before RAM")
    return b"".join(b"".join(_read(source, s.offset, s.offset + s.length)) for s in before)


def _is_ram(section: Section) -> bool:
    live = (SectionKind.START, SectionKind.PART, SectionKind.END)
    return section.kind in live and section.name == RAM_NAME
