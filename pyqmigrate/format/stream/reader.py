"""Reading an untrusted stream from its magic to its end.

A :class:`StreamReader` reads the header and the configuration, has an
:class:`~pyqmigrate.format.stream.elements.ElementReader` read the elements, and reads the bodies of
RAM's sections. The forms of a stream differ in those bodies: subclasses read them.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.cursor import ByteSource, Cursor
from pyqmigrate.format.stream import description, mapped_ram
from pyqmigrate.format.stream.elements import ElementReader
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX
from pyqmigrate.format.stream.start import StreamStart, read_start
from pyqmigrate.format.stream.wire import FLAG_EOS, FLAG_MEM_SIZE, RAM_NAME, Section, SectionKind

__all__ = ["StreamReader"]

_FLAGS = min(mapped_ram.PAGE_SIZES) - 1  # the flag bits of a RAM word, whatever the page size
_UNFINISHED = "no RAM END section: the save did not finish"


class StreamReader(abc.ABC):
    """The state of one reading: :meth:`read_head` up to RAM's block list, then :meth:`read_rest`.

    A source of unknown size has ``run_out``, which fetches the rest of it and returns its size.
    Such a stream's description, at its end, is read after RAM's END.

    QEMU writes no END of RAM in a background snapshot: there RAM ends before the first device
    section that follows a PART, and ``background`` is set. Only the end of the stream shows that
    such a save finished, so it must be found.
    """

    unfinished = _UNFINISHED  # the error for a stream without RAM END

    def __init__(
        self, source: ByteSource, offset: int, run_out: Callable[[], int] | None = None
    ) -> None:
        self._source = source
        self._run_out = run_out
        self._offset = offset
        self._cursor = Cursor(source, offset)
        self._elements = ElementReader(
            source,
            self._cursor,
            self._read_ram,
            ram_left_open=self._leave_ram_open,
            unfinished=self.unfinished,
        )
        self.background = False
        self._total = 0
        self._ram_start: Section | None = None
        self._ram_end: int | None = None

    def read_head(self, start: StreamStart | None = None) -> None:
        """Read the configuration, the description, and elements up to the list of RAM blocks.

        start: the configuration, if it has been read already.
        """
        start = start or read_start(self._source, self._offset)
        self._configuration, self._cursor.position = start.configuration, start.end
        self._check_form()
        if self._run_out is None:
            self._elements.description = description.read_from_end(self._source)
        for section in self._elements:
            if section.kind is SectionKind.START and section.name == RAM_NAME:
                self._ram_start = section
                return
        raise SnapshotError(self.unfinished, offset=self._cursor.position)

    def read_rest(self) -> tuple[int, int]:
        """Read the rest of the elements, and the description.

        Return the offset of RAM END, or of the first device section of a background snapshot, and
        that of the end of the elements.
        """
        for section in self._elements:
            if section.kind is SectionKind.END and section.name == RAM_NAME:
                if self.background:
                    raise SnapshotError("RAM END after device sections", offset=section.offset)
                self._end_ram(section.offset)
        end = self._cursor.position
        if self._ram_end is None:
            raise SnapshotError(self.unfinished, offset=end)
        if self.background and self._elements.opaque and self._elements.description is None:
            raise SnapshotError(
                "a background snapshot whose end is missing: the save did not finish", offset=end
            )
        if not self._elements.opaque:
            self._read_description()
        return self._ram_end, end

    @abc.abstractmethod
    def _check_form(self) -> None:
        """Refuse a stream whose configuration belongs to another form."""

    @abc.abstractmethod
    def _read_blocks(self, page_size: int | None) -> None:
        """Read the block list of ``self._total`` bytes; the configuration states ``page_size``."""

    @abc.abstractmethod
    def _read_pages(self) -> None:
        """Read the body of RAM's PART or END, up to its footer."""

    def _leave_ram_open(self, offset: int) -> None:
        self.background = True
        self._end_ram(offset)

    def _end_ram(self, offset: int) -> None:
        self._ram_end = offset
        self._elements.unfinished = None
        if self._run_out is not None:
            self._cursor.size = self._run_out()
            self._elements.description = description.read_from_end(self._source)

    def _read_ram(self, is_start: bool, offset: int) -> None:
        if is_start:
            self._read_ram_start(offset)
            self._read_end_mark("the start")
        else:
            self._read_pages()

    def _read_end_mark(self, what: str) -> None:
        offset = self._cursor.position
        word = self._cursor.u64("a RAM section")
        if word != FLAG_EOS:
            raise SnapshotError(
                f"{what} of RAM has the word {word:#x} where only its end mark can be",
                offset=offset,
            )

    def _read_ram_start(self, element_offset: int) -> None:
        if self._ram_start is not None:
            raise SnapshotError("RAM is started twice", offset=element_offset)
        offset = self._cursor.position
        word = self._cursor.u64("the size of RAM")
        self._total = word - FLAG_MEM_SIZE
        if word & _FLAGS != FLAG_MEM_SIZE or self._total > OFFSET_MAX:
            raise SnapshotError(f"invalid RAM size word {word:#x}", offset=offset, field="total")
        bits = self._configuration.target_page_bits
        # Only small shifts make a page size; others are refused with the first block.
        self._read_blocks(None if bits is None else 1 << bits if bits < 64 else 0)

    def _read_description(self) -> None:
        offset = self._cursor.position
        found = self._elements.description
        if found is None:
            self._elements.description = description.read(self._cursor)
        elif found.offset != offset:
            raise SnapshotError(
                f"the stream ends here, but its description is at {found.offset:#x}:"
                " the elements between were lost",
                offset=offset,
            )
