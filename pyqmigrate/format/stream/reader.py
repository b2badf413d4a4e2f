"""Walking a stream that nobody vouches for, from its magic to its end.

The walk reads elements one after another. It is bounded by the file's size and by limits of its
own in time and memory, goes only forward, and does not recurse on what it reads. What stands in
RAM's sections differs between the kinds of streams: :class:`Walk` leaves it to its subclasses.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.cursor import ByteSource, Cursor
from pyqmigrate.format.stream import description, live_sections, mapped_ram
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX
from pyqmigrate.format.stream.start import StreamStart, read_start
from pyqmigrate.format.stream.wire import (
    COMMAND,
    COMMAND_NAMES,
    COMMAND_PACKAGED,
    FLAG_EOS,
    FLAG_MEM_SIZE,
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

__all__ = ["ELEMENTS_MAX", "LISTED_MAX", "PARTS_LISTED", "Walk"]

# QEMU can spin while it waits for a dirty bitmap, and then writes tens of thousands of empty
# PARTs a second: many have to be walked, but not all be kept.
ELEMENTS_MAX = 1 << 22  # elements in one stream
PARTS_LISTED = 1 << 16  # from here on, Stream.sections leaves PARTs out
LISTED_MAX = PARTS_LISTED + (1 << 15)  # elements in Stream.sections

_SEARCH_MAX = 256 << 20  # bytes that all searches for lost footers may read together
_CANDIDATE_COST = 1024  # what a footer that turned out wrong takes from that, in bytes
_CHUNK = 1 << 20
_FLAGS = min(mapped_ram.PAGE_SIZES) - 1  # the flag bits of a RAM word, whatever the page size
_KINDS = {kind.value: kind for kind in SectionKind}
_WHAT = {kind: f"a {kind.name} section" for kind in SectionKind}

_UNFINISHED = "no RAM END section: the save did not finish"


class Walk(abc.ABC):
    """The state of one walk: :meth:`read_head` up to RAM's block list, then :meth:`read_rest`.

    A source whose end is not known at first has ``run_out``, which fetches all that is left and
    returns its size; the description, at its end, is looked for after RAM's END then.
    """

    unfinished = _UNFINISHED  # what is wrong with a stream without RAM END

    def __init__(
        self, source: ByteSource, offset: int, run_out: Callable[[], int] | None = None
    ) -> None:
        self._source = source
        self._run_out = run_out
        self._offset = offset
        self._cursor = Cursor(source, offset)
        self._sections: list[Section] = []
        self._live: dict[int, Section] = {}  # START sections without their END, by section id
        self._opaque = False  # the device state cannot be walked to its end
        self._elements = self._walk_elements()
        self._total = 0
        self._ram_start: Section | None = None
        self._ram_end: int | None = None
        self._search_left = _SEARCH_MAX
        self._chunks = live_sections.Chunks()

    def read_head(self, start: StreamStart | None = None) -> None:
        """Read the configuration, the description, and elements up to the list of RAM blocks.

        start: the configuration, if it has been read already.
        """
        start = start or read_start(self._source, self._offset)
        self._configuration, self._cursor.position = start.configuration, start.end
        self._check_kind()
        self._find_description(None if self._run_out else description.locate(self._source))
        while self._ram_start is None:
            if next(self._elements, None) is None:
                raise SnapshotError(self.unfinished, offset=self._cursor.position)

    def _find_description(self, found: description.Description | None) -> None:
        self._described = found
        self._lengths = description.body_lengths(found.value) if found else {}
        self._device_names = {name for name, _ in self._lengths}

    def read_rest(self) -> tuple[int, int]:
        """Read the elements that are left, and the description.

        Returns the offset of RAM END, and that of the end of the elements.
        """
        for _ in self._elements:
            pass
        walked = self._cursor.position
        if self._ram_end is None:
            raise SnapshotError(self.unfinished, offset=walked)
        if not self._opaque:
            self._read_description()
        return self._ram_end, walked

    @abc.abstractmethod
    def _check_kind(self) -> None:
        """Refuse a stream whose configuration says that it is of another kind."""

    @abc.abstractmethod
    def _read_blocks(self, page_size: int | None) -> None:
        """Read the block list of ``self._total`` bytes; the configuration states ``page_size``."""

    @abc.abstractmethod
    def _read_pages(self) -> None:
        """Read the rest of a RAM section, up to its footer."""

    def _walk_elements(self) -> Iterator[Section]:
        """Read elements up to the end of the stream, or to device state that is opaque."""
        cursor = self._cursor
        for _ in range(ELEMENTS_MAX):
            at = cursor.position
            if at >= cursor.size:
                what = "the end-of-stream byte is missing: the file was cut short"
                raise SnapshotError(self.unfinished if self._ram_end is None else what, offset=at)
            number = cursor.u8("an element")
            if number == TYPE_EOF:
                return
            kind = _KINDS.get(number)
            if kind is None:
                raise SnapshotError(f"there is no element of type {number:#04x}", offset=at)
            section = (
                self._read_command(at)
                if kind is SectionKind.COMMAND
                else self._read_section(kind, at)
            )
            if section is None:
                cursor.position = at
                self._opaque = True
                return
            if kind is not SectionKind.PART or self._lists_parts():
                self._sections.append(section)
                if len(self._sections) > LISTED_MAX:
                    raise SnapshotError(f"more than {LISTED_MAX} sections", offset=at)
            yield section
        raise SnapshotError(f"more than {ELEMENTS_MAX} elements", offset=cursor.position)

    def _read_command(self, at: int) -> Section:
        self._cursor.position = at
        _, number, length = COMMAND.unpack(self._cursor.take(COMMAND.size, "a command"))
        if number == COMMAND_PACKAGED:
            raise NotSupported(f"a packaged stream inside the stream (file offset {at:#x})")
        body = self._cursor.position
        self._cursor.skip(length, "a command")
        name = COMMAND_NAMES.get(number, f"command {number}")
        return Section(
            SectionKind.COMMAND, None, name, 0, 0, at, COMMAND.size + length, body, length
        )

    def _read_section(self, kind: SectionKind, at: int) -> Section | None:
        """Read a section after its type byte; None when it cannot be stepped over.

        For a PART that is not listed, its START stands: millions of them take their time.
        """
        cursor = self._cursor
        what = _WHAT[kind]
        section_id = cursor.u32(what)
        if kind in (SectionKind.START, SectionKind.FULL):
            name = cursor.text(what)
            if not name:
                raise SnapshotError(f"{what} without a name", offset=at, field="name")
            instance, version = INSTANCE.unpack(cursor.take(INSTANCE.size, what))
            if kind is SectionKind.START and section_id in self._live:
                raise SnapshotError(f"section id {section_id} is started twice", offset=at)
        else:
            start = self._live.get(section_id)
            if start is None:
                raise SnapshotError(
                    f"{what} has id {section_id}, which no START has", offset=at, field="section id"
                )
            name, instance, version = start.name, start.instance_id, start.version_id
        body = cursor.position
        walk = live_sections.walker(name, version)
        if kind is not SectionKind.FULL and name == RAM_NAME:
            self._read_ram(kind, instance, version, at)
        elif kind is not SectionKind.FULL and walk is not None:
            walk(cursor, kind is SectionKind.START, self._chunks)
        elif not self._step_over(kind, section_id, name, instance):
            if self._ram_end is not None:
                return None
            raise SnapshotError(
                f"section {name!r} cannot be stepped over, and RAM END was not seen before it:"
                " the save did not finish, or this device is not known here",
                offset=at,
            )
        end = cursor.position
        if cursor.take(SECTION_ID.size, "a footer") != SECTION_ID.pack(FOOTER_TYPE, section_id):
            raise SnapshotError(f"section {name!r} has no footer", offset=end, field="footer")
        if kind is SectionKind.PART and not self._lists_parts():
            return self._live[section_id]
        section = Section(
            kind, section_id, name, instance, version, at, cursor.position - at, body, end - body
        )
        if kind is not SectionKind.PART:
            self._note(section)
        return section

    def _lists_parts(self) -> bool:
        return len(self._sections) < PARTS_LISTED

    def _note(self, section: Section) -> None:
        if section.section_id is None or section.kind is SectionKind.FULL:
            return
        if section.kind is SectionKind.START:
            self._live[section.section_id] = section
            if section.name == RAM_NAME:
                self._ram_start = section
        elif section.kind is SectionKind.END:
            del self._live[section.section_id]
            if section.name == RAM_NAME:
                self._ram_end = section.offset
                if self._run_out is not None:
                    self._cursor.size = self._run_out()
                    self._find_description(description.locate(self._source))

    def _read_ram(self, kind: SectionKind, instance: int, version: int, at: int) -> None:
        if (instance, version) != (RAM_INSTANCE, RAM_VERSION):
            raise SnapshotError(
                f"RAM section with instance {instance} and version {version};"
                f" only {RAM_INSTANCE} and {RAM_VERSION} are known",
                offset=at,
                field="version",
            )
        if kind is SectionKind.START:
            self._read_ram_start(at)
            self._read_end_mark("the start")
        else:
            self._read_pages()

    def _read_end_mark(self, what: str) -> None:
        at = self._cursor.position
        word = self._cursor.u64("a RAM section")
        if word != FLAG_EOS:
            raise SnapshotError(
                f"{what} of RAM has the word {word:#x} where only its end mark can be", offset=at
            )

    def _read_ram_start(self, at: int) -> None:
        if self._ram_start is not None:
            raise SnapshotError("RAM is started twice", offset=at)
        at = self._cursor.position
        word = self._cursor.u64("the size of RAM")
        self._total = word - FLAG_MEM_SIZE
        if word & _FLAGS != FLAG_MEM_SIZE or self._total > OFFSET_MAX:
            raise SnapshotError(
                f"RAM starts with the word {word:#x}, which is not a size", offset=at, field="total"
            )
        bits = self._configuration.target_page_bits
        # Only small shifts make a page size; others are refused with the first block.
        self._read_blocks(None if bits is None else 1 << bits if bits < 64 else 0)

    def _step_over(self, kind: SectionKind, section_id: int, name: str, instance: int) -> bool:
        """Move over a body that is not understood to its footer; False where that fails."""
        cursor = self._cursor
        body = cursor.position
        footer = SECTION_ID.pack(FOOTER_TYPE, section_id)
        length = self._lengths.get((name, instance)) if kind is SectionKind.FULL else None
        if length is not None and length <= cursor.size - body:
            cursor.position = body + length
            if cursor.peek(len(footer)) == footer:
                return True
        for candidate in self._find(footer, body):
            if self._can_start_element(candidate + len(footer)):
                cursor.position = candidate
                return True
        return False

    def _find(self, mark: bytes, start: int) -> Iterator[int]:
        """Offsets from ``start`` at which ``mark`` stands, while the budget for searches lasts."""
        limit = self._described.offset if self._described else self._cursor.size
        while start < limit and self._search_left > 0:
            chunk = self._source.read_at(start, min(_CHUNK + len(mark) - 1, limit - start))
            if not chunk:  # the end of a source whose size is not known before
                return
            self._search_left -= len(chunk)
            hit = chunk.find(mark)
            while hit >= 0 and self._search_left > 0:
                self._search_left -= _CANDIDATE_COST
                yield start + hit
                hit = chunk.find(mark, hit + 1)
            start += _CHUNK

    def _can_start_element(self, at: int) -> bool:
        """Whether what stands at ``at`` looks like the next element, judged by its first bytes."""
        self._cursor.position = at
        data = self._cursor.peek(SECTION_ID.size + 1 + 255)
        if not data:
            return False
        if data[0] == TYPE_EOF:
            if self._described is not None:
                return at + 1 == self._described.offset
            # Nothing vouches for a section found by search: the stream's end must fit as well.
            return at + 1 == self._cursor.size or data[1:2] == bytes([description.TYPE_DESCRIPTION])
        if len(data) < SECTION_ID.size or data[0] not in _KINDS:
            return False
        kind = _KINDS[data[0]]
        if kind is SectionKind.COMMAND:
            return COMMAND.unpack(data[: COMMAND.size])[1] in COMMAND_NAMES
        if kind in (SectionKind.PART, SectionKind.END):
            return SECTION_ID.unpack(data[: SECTION_ID.size])[1] in self._live
        counted = data[SECTION_ID.size :]
        name = counted[1 : 1 + counted[0]].decode("utf-8", "replace") if counted else ""
        if kind is SectionKind.FULL and self._described is not None:
            return name in self._device_names
        return name != "" and name.isprintable() and "\ufffd" not in name

    def _read_description(self) -> None:
        at = self._cursor.position
        if self._described is None:
            self._described = description.read(self._cursor)
        elif self._described.offset != at:
            raise SnapshotError(
                "the stream ends here, but its description is at"
                f" {self._described.offset:#x}: the elements between were lost",
                offset=at,
            )
