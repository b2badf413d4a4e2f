"""Reading the elements of an untrusted stream, one after another.

An :class:`ElementReader` knows the framing of elements and how to skip bodies that it does not
understand. It knows no configuration and no RAM: the bodies of RAM's sections are read by a function
that it is given. Reading is bounded in time and memory by the file's size and by limits of its own,
goes forward only, and never recurses on input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.cursor import ByteSource, Cursor
from pyqmigrate.format.stream import description, live_sections
from pyqmigrate.format.stream.description import Description
from pyqmigrate.format.stream.wire import (
    COMMAND,
    COMMAND_NAMES,
    COMMAND_PACKAGED,
    FOOTER_TYPE,
    INSTANCE,
    RAM_INSTANCE,
    RAM_NAME,
    RAM_VERSION,
    SECTION_ID,
    TYPE_EOF,
    Section,
    SectionKind,
)

__all__ = ["ELEMENTS_MAX", "LISTED_MAX", "PARTS_LISTED", "ElementReader"]

# QEMU can spin while it waits for a dirty bitmap, and then writes tens of thousands of empty
# PARTs a second: many have to be read, but not all be kept.
ELEMENTS_MAX = 1 << 22  # elements in one stream
PARTS_LISTED = 1 << 16  # from here on, Stream.sections leaves PARTs out
LISTED_MAX = PARTS_LISTED + (1 << 15)  # elements in Stream.sections

_SEARCH_MAX = 256 << 20  # bytes that all searches for lost footers may read together
_CANDIDATE_COST = 1024  # bytes of that for each footer that turned out wrong
_CHUNK = 1 << 20
_KINDS = {kind.value: kind for kind in SectionKind}
_LABELS = {kind: f"a {kind.name} section" for kind in SectionKind}


class ElementReader:
    """The elements of a stream from a cursor on. Iterate over it once.

    read_ram: reads the body of a RAM section, up to its footer; it is given whether the section
        is START and the offset of its element.
    ram_left_open: called with the offset of the first device section if RAM's PARTs have no END
        before it, as in a background snapshot; before the body of that section is read.

    ``unfinished`` is the reader's error if the stream ends, or cannot be skipped any further,
    before RAM is complete; the owner sets it to None then, or at once if there is no RAM.
    ``opaque`` is True after the last element if device state could not be skipped; the cursor is
    at that element. ``sections`` are the elements so far; after PARTS_LISTED of them PARTs are left
    out.
    """

    def __init__(
        self,
        source: ByteSource,
        cursor: Cursor,
        read_ram: Callable[[bool, int], None],
        *,
        ram_left_open: Callable[[int], None] | None = None,
        unfinished: str | None = None,
    ) -> None:
        self.cursor = cursor
        self.sections: list[Section] = []
        self.opaque = False
        self.unfinished = unfinished
        self._source = source
        self._read_ram = read_ram
        self._ram_left_open = ram_left_open
        self._ram_is_open = False  # the last RAM section was a PART
        self._live: dict[int, Section] = {}  # START sections without their END, by section id
        self._description: Description | None = None
        self._lengths: dict[tuple[str, int], int] = {}
        self._device_names: set[str] = set()
        self._search_left = _SEARCH_MAX
        self._chunks = live_sections.ChunkBudget()
        self._elements = self._read_elements()

    def __iter__(self) -> Iterator[Section]:
        return self._elements

    @property
    def description(self) -> Description | None:
        """The description of the stream, if it was found before the end of the elements.

        Setting it makes the lengths of device state known.
        """
        return self._description

    @description.setter
    def description(self, found: Description | None) -> None:
        self._description = found
        self.expect_lengths(description.body_lengths(found.value) if found else {})
        self._device_names = {name for name, _ in self._lengths}

    def expect_lengths(self, lengths: dict[tuple[str, int], int]) -> None:
        """Try these lengths of bodies, by name and instance, before searching for a footer."""
        self._lengths = lengths

    def find(self, mark: bytes, start: int) -> Iterator[int]:
        """Yield offsets of ``mark`` from ``start`` on, while the budget for searches lasts."""
        limit = self._description.offset if self._description else self.cursor.size
        while start < limit and self._search_left > 0:
            chunk = self._source.read_at(start, min(_CHUNK + len(mark) - 1, limit - start))
            if not chunk:  # the end of a source of unknown size
                return
            self._search_left -= len(chunk)
            index = chunk.find(mark)
            while index >= 0 and self._search_left > 0:
                self._search_left -= _CANDIDATE_COST
                yield start + index
                index = chunk.find(mark, index + 1)
            start += _CHUNK

    def _read_elements(self) -> Iterator[Section]:
        """Read elements up to the end of the stream, or to device state that is opaque."""
        cursor = self.cursor
        for _ in range(ELEMENTS_MAX):
            offset = cursor.position
            if offset >= cursor.size:
                raise SnapshotError(
                    self.unfinished or "the end-of-stream byte is missing: the file was cut short",
                    offset=offset,
                )
            number = cursor.u8("an element")
            if number == TYPE_EOF:
                return
            kind = _KINDS.get(number)
            if kind is None:
                raise SnapshotError(f"unknown element type {number:#04x}", offset=offset)
            section = (
                self._read_command(offset)
                if kind is SectionKind.COMMAND
                else self._read_section(kind, offset)
            )
            if section is None:
                cursor.position = offset
                self.opaque = True
                return
            if kind is not SectionKind.PART or self._lists_parts():
                self.sections.append(section)
                if len(self.sections) > LISTED_MAX:
                    raise SnapshotError(f"more than {LISTED_MAX} sections", offset=offset)
            yield section
        raise SnapshotError(f"more than {ELEMENTS_MAX} elements", offset=cursor.position)

    def _read_command(self, offset: int) -> Section:
        self.cursor.position = offset
        _, number, length = COMMAND.unpack(self.cursor.take(COMMAND.size, "a command"))
        if number == COMMAND_PACKAGED:
            raise NotSupported(f"a packaged stream inside the stream (file offset {offset:#x})")
        body = self.cursor.position
        self.cursor.skip(length, "a command")
        name = COMMAND_NAMES.get(number, f"command {number}")
        return Section(
            SectionKind.COMMAND, None, name, 0, 0, offset, COMMAND.size + length, body, length
        )

    def _read_section(self, kind: SectionKind, offset: int) -> Section | None:
        """Read a section after its type byte; None if it cannot be skipped.

        For a PART that is not listed, return its START: there may be millions of PARTs.
        """
        cursor = self.cursor
        label = _LABELS[kind]
        section_id = cursor.u32(label)
        if kind in (SectionKind.START, SectionKind.FULL):
            name = cursor.text(label)
            if not name:
                raise SnapshotError(f"{label} without a name", offset=offset, field="name")
            instance, version = INSTANCE.unpack(cursor.take(INSTANCE.size, label))
            if kind is SectionKind.START and section_id in self._live:
                raise SnapshotError(f"section id {section_id} is started twice", offset=offset)
        else:
            start = self._live.get(section_id)
            if start is None:
                raise SnapshotError(
                    f"{label} has id {section_id}, which no START has",
                    offset=offset,
                    field="section id",
                )
            name, instance, version = start.name, start.instance_id, start.version_id
        if kind is SectionKind.FULL and self._ram_is_open and self._ram_left_open is not None:
            self._ram_is_open = False
            self._ram_left_open(offset)
        body = cursor.position
        read_body = live_sections.body_reader(name, version)
        if kind is not SectionKind.FULL and name == RAM_NAME:
            if (instance, version) != (RAM_INSTANCE, RAM_VERSION):
                raise SnapshotError(
                    f"RAM section with instance {instance} and version {version};"
                    f" only {RAM_INSTANCE} and {RAM_VERSION} are known",
                    offset=offset,
                    field="version",
                )
            self._read_ram(kind is SectionKind.START, offset)
            self._ram_is_open = kind is SectionKind.PART
        elif kind is not SectionKind.FULL and read_body is not None:
            read_body(cursor, kind is SectionKind.START, self._chunks)
        elif not self._skip_body(kind, section_id, name, instance):
            if self.unfinished is None:
                return None
            raise SnapshotError(
                f"section {name!r} cannot be skipped, and no RAM END section came before it:"
                " the save did not finish, or this device is not known here",
                offset=offset,
            )
        end = cursor.position
        if cursor.take(SECTION_ID.size, "a footer") != SECTION_ID.pack(FOOTER_TYPE, section_id):
            raise SnapshotError(f"section {name!r} has no footer", offset=end, field="footer")
        if kind is SectionKind.PART and not self._lists_parts():
            return self._live[section_id]
        section = Section(
            kind,
            section_id,
            name,
            instance,
            version,
            offset,
            cursor.position - offset,
            body,
            end - body,
        )
        if kind is SectionKind.START:
            self._live[section_id] = section
        elif kind is SectionKind.END:
            del self._live[section_id]
        return section

    def _lists_parts(self) -> bool:
        return len(self.sections) < PARTS_LISTED

    def _skip_body(self, kind: SectionKind, section_id: int, name: str, instance: int) -> bool:
        """Move over a body that is not understood, to its footer; return False if that fails."""
        cursor = self.cursor
        body = cursor.position
        footer = SECTION_ID.pack(FOOTER_TYPE, section_id)
        length = self._lengths.get((name, instance)) if kind is SectionKind.FULL else None
        if length is not None and length <= cursor.size - body:
            cursor.position = body + length
            if cursor.peek(len(footer)) == footer:
                return True
        for candidate in self.find(footer, body):
            if self._can_start_element(candidate + len(footer)):
                cursor.position = candidate
                return True
        return False

    def _can_start_element(self, offset: int) -> bool:
        """Return whether the bytes at ``offset`` look like the start of an element."""
        self.cursor.position = offset
        data = self.cursor.peek(SECTION_ID.size + 1 + 255)
        if not data:
            return False
        if data[0] == TYPE_EOF:
            if self._description is not None:
                return offset + 1 == self._description.offset
            # A section found by search is a guess: the stream's end must fit as well.
            return offset + 1 == self.cursor.size or (
                data[1:2] == bytes([description.TYPE_DESCRIPTION])
            )
        if len(data) < SECTION_ID.size or data[0] not in _KINDS:
            return False
        kind = _KINDS[data[0]]
        if kind is SectionKind.COMMAND:
            return COMMAND.unpack(data[: COMMAND.size])[1] in COMMAND_NAMES
        if kind in (SectionKind.PART, SectionKind.END):
            return SECTION_ID.unpack(data[: SECTION_ID.size])[1] in self._live
        name_field = data[SECTION_ID.size :]
        name = name_field[1 : 1 + name_field[0]].decode("utf-8", "replace") if name_field else ""
        if kind is SectionKind.FULL and self._description is not None:
            return name in self._device_names
        return name != "" and name.isprintable() and "\ufffd" not in name
