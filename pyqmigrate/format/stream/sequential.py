"""The sequential stream: RAM as records of pages, one after another, without fixed places.

The elements are those of any stream (:mod:`~pyqmigrate.format.stream.wire`); the capabilities do
not list ``mapped-ram``. RAM's sections, big-endian throughout
(docs/internals/format.md, "Block list" and "Sequential streams")::

    START    u64 total | 4, the blocks, u64 0x10
    block    str8 name | u64 length | [u64 guest address, with x-ignore-shared]
    PART     records, u64 0x10
    END      records, u64 0x10

A record is a word, a block's name unless it continues with that of the record before, and a page,
a byte that fills the page, or changes to it; the core decodes and encodes records. The stream does
not record the page size: the description does, or ``target-page-bits``.

A writer combines ``encode_head``, for each pass over memory ``encode_part_header``, records and
``RAM_EOS``, and ``encode_end`` (:mod:`~pyqmigrate.format.stream.writer`).
:class:`SequentialStreamReader` reads a stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.cursor import ByteSource
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.configuration import IGNORE_SHARED, MAPPED_RAM, Configuration
from pyqmigrate.format.stream.mapped_ram import BLOCKS_MAX, OFFSET_MAX, PAGE_SIZES
from pyqmigrate.format.stream.reader import StreamReader
from pyqmigrate.format.stream.wire import Section, after_ram
from pyqmigrate.format.stream.writer import RAM_EOS, encode_front

__all__ = [
    "ListedBlock",
    "SequentialStream",
    "SequentialStreamReader",
    "encode_head",
    "settings_of",
]

_U64 = struct.Struct(">Q")
_USUAL_PAGE_SIZE = 4096


@dataclass(frozen=True)
class ListedBlock:
    """A RAM block as a sequential stream lists it; ``length`` in bytes.

    ``entry_offset`` is the file offset of its entry, ``gpa`` the guest physical address if the
    stream records it (``x-ignore-shared``), for information only.
    """

    name: str
    length: int
    entry_offset: int
    gpa: int | None = None


@dataclass(frozen=True)
class SequentialStream:
    """A sequential stream that was read to its end. Offsets are absolute in the file.

    Fields are those of :class:`~pyqmigrate.format.stream.wire.Stream`.
    """

    machine: str
    capabilities: tuple[str, ...]
    target_page_bits: int | None
    uuid: bytes | None
    page_size: int
    total_ram: int
    blocks: tuple[ListedBlock, ...]
    sections: tuple[Section, ...]
    description: dict[str, Any] | None
    description_offset: int | None
    ram_end: int
    end: int
    complete: bool
    opaque_tail: bool
    background: bool = False

    @property
    def after_ram(self) -> int:
        """The offset of the first element after RAM."""
        return after_ram(self.sections, self.ram_end, self.background)

    @property
    def ignore_shared(self) -> bool:
        """Whether a block without any record may have its content in a file of its own."""
        return IGNORE_SHARED in self.capabilities


def settings_of(
    machine: str,
    *,
    target_page_bits: int | None = None,
    uuid: bytes | None = None,
    ignore_shared: bool = False,
) -> Configuration:
    """Return the configuration of a stream; arguments as for :func:`encode_head`."""
    capabilities = (IGNORE_SHARED,) if ignore_shared else ()
    return Configuration(machine, capabilities, target_page_bits, uuid)


def encode_head(
    machine: str,
    specs: Sequence[BlockSpec],
    *,
    target_page_bits: int | None = None,
    uuid: bytes | None = None,
    ignore_shared: bool = False,
    before: bytes = b"",
) -> bytes:
    """Return the start of a stream with these blocks, up to the end of RAM's START.

    Arguments and errors are those of :func:`pyqmigrate.format.stream.writer.encode_head`.
    """
    settings = settings_of(
        machine, target_page_bits=target_page_bits, uuid=uuid, ignore_shared=ignore_shared
    )
    parts = [encode_front(settings, specs, before)]
    for spec in specs:
        name = spec.name.encode("utf-8", "surrogateescape")
        address = _U64.pack(spec.address) if ignore_shared else b""
        parts.append(bytes([len(name)]) + name + _U64.pack(spec.length) + address)
    return b"".join(parts) + RAM_EOS


class SequentialStreamReader(StreamReader):
    """A reader of a sequential stream, which leaves the page records to the caller.

    page_size: in bytes, for a stream that does not state one.
    read_records: called at the start of each body of records with its file offset; returns the
        offset just after it.

    ``blocks`` and ``page_size`` are known after ``read_head``. Raises the errors of
    :func:`pyqmigrate.format.stream.writer.parse`, and those of ``read_records``.
    """

    def __init__(
        self,
        source: ByteSource,
        offset: int,
        read_records: Callable[[int], int],
        *,
        page_size: int | None = None,
        run_out: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(source, offset, run_out)
        self._read_records = read_records
        self._given_page_size = page_size
        self.page_size = 0
        self.blocks: tuple[ListedBlock, ...] = ()

    @property
    def configuration(self) -> Configuration:
        """The configuration of the stream, after ``read_head``."""
        return self._configuration

    @property
    def head(self) -> tuple[Section, ...]:
        """The sections up to RAM's list of blocks, after ``read_head``."""
        return tuple(self._elements.sections)

    def stream(self) -> SequentialStream:
        """Read the stream to its end; call it once, after ``read_head``."""
        ram_end, elements_end = self.read_rest()
        description, settings = self._elements.description, self._configuration
        opaque = self._elements.opaque
        stated = description.value.get("page_size") if description else None
        # In a forward-only source the description comes last; otherwise it was read first.
        late = self._run_out is not None and settings.target_page_bits is None
        if late and type(stated) is int and stated != self.page_size:
            raise SnapshotError(
                f"the description states pages of {stated} bytes, but {self.page_size} were read",
                offset=description.offset if description else None,
                field="page_size",
            )
        end = self._cursor.size if opaque else elements_end
        return SequentialStream(
            machine=settings.machine,
            capabilities=settings.capabilities,
            target_page_bits=settings.target_page_bits,
            uuid=settings.uuid,
            page_size=self.page_size,
            total_ram=self._total,
            blocks=self.blocks,
            sections=tuple(self._elements.sections),
            description=description.value if description else None,
            description_offset=description.offset if description else None,
            ram_end=ram_end,
            end=description.end if description else end,
            complete=not opaque or description is not None,
            opaque_tail=opaque,
            background=self.background,
        )

    def _check_form(self) -> None:
        if MAPPED_RAM in self._configuration.capabilities:
            raise NotSupported("a mapped-ram stream: its pages are at fixed offsets")

    def _read_blocks(self, page_size: int | None) -> None:
        self.page_size = self._find_page_size(page_size, self._cursor.position)
        blocks: list[ListedBlock] = []
        names: set[str] = set()
        remaining = self._total
        while remaining:
            block = self._read_entry()
            if len(blocks) == BLOCKS_MAX:
                raise SnapshotError(f"more than {BLOCKS_MAX} RAM blocks", offset=block.entry_offset)
            if block.name in names:
                raise _fault(block, "duplicate block name", "name")
            if block.length > remaining:
                raise _fault(
                    block,
                    f"the blocks are longer together than the total of {self._total} bytes",
                    "length",
                )
            names.add(block.name)
            blocks.append(block)
            remaining -= block.length
        self.blocks = tuple(blocks)

    def _read_entry(self) -> ListedBlock:
        cursor = self._cursor
        offset = cursor.position
        name = cursor.text("the name of a RAM block")
        if not name:
            raise SnapshotError("a RAM block without a name", offset=offset, field="name")
        what = f"the entry of RAM block {name!r}"
        length = cursor.u64(what)
        ignore_shared = IGNORE_SHARED in self._configuration.capabilities
        gpa = cursor.u64(what) if ignore_shared else None
        block = ListedBlock(name, length, offset, gpa)
        if length == 0 or length % self.page_size or length > OFFSET_MAX:
            raise _fault(
                block,
                f"length {length} is not a positive multiple of the page size {self.page_size}",
                "length",
            )
        return block

    def _find_page_size(self, stated: int | None, offset: int) -> int:
        """Return the page size from the configuration, else the description, else the caller."""
        description = self._elements.description
        described = description.value.get("page_size") if description else None
        if type(described) is int and stated is None:
            stated = described
        given = self._given_page_size
        if stated is not None and given is not None and stated != given:
            raise SnapshotError(
                f"pages of {stated} bytes are stated, but {given} were expected",
                offset=offset,
                field="page_size",
            )
        size = stated if stated is not None else given or _USUAL_PAGE_SIZE
        if size not in PAGE_SIZES:
            raise SnapshotError(
                f"page size {size} is not a power of two from 1024 to 65536",
                offset=offset,
                field="page_size",
            )
        return size

    def _read_pages(self) -> None:
        self._cursor.position = self._read_records(self._cursor.position)


def _fault(block: ListedBlock, message: str, field: str) -> SnapshotError:
    return SnapshotError(message, offset=block.entry_offset, block=block.name, field=field)
