"""Encoding a stream.

A stream is a sequence of elements (:mod:`~pyqmigrate.format.stream.wire` has the grammar); RAM's
jumps over each block's bitmap and pages (:mod:`~pyqmigrate.format.stream.mapped_ram`).

The caller writes ``encode_head(...).pieces``, then pages and bitmaps at the offsets of
``Head.blocks``, then ``encode_tail(...)`` at ``Head.tail_offset``::

    head = encode_head("pc-q35-10.0", [BlockSpec("pc.ram", 1 << 30)])
    ...
    tail = encode_tail(settings=head.configuration)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pyqmigrate.errors import UsageError
from pyqmigrate.format.stream import configuration
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.description import encode as encode_description
from pyqmigrate.format.stream.description import no_devices, with_configuration
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX, BlockLayout, encode_entry
from pyqmigrate.format.stream.wire import (
    COMMAND,
    COMMAND_SWITCHOVER_START,
    FLAG_EOS,
    FLAG_MEM_SIZE,
    FOOTER_TYPE,
    INSTANCE,
    MAGIC,
    PREAMBLE,
    RAM_INSTANCE,
    RAM_NAME,
    RAM_VERSION,
    SECTION_ID,
    TYPE_CONFIGURATION,
    TYPE_EOF,
    VERSION,
    WORD,
    SectionKind,
)

__all__ = [
    "RAM_EOS",
    "RAM_SECTION_ID",
    "Head",
    "Piece",
    "encode_end",
    "encode_front",
    "encode_head",
    "encode_part_header",
    "encode_ram_end",
    "encode_tail",
]

# QEMU numbers the sections of a stream from 0 on, so that no device's section has this id ("RAM").
RAM_SECTION_ID = 0x52414D
RAM_EOS = WORD.pack(FLAG_EOS) + SECTION_ID.pack(FOOTER_TYPE, RAM_SECTION_ID)


@dataclass(frozen=True)
class Piece:
    """Bytes, and the absolute file offset at which they belong."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class Head:
    """The start of a stream, up to the last block's pages.

    ``pieces`` are in ascending order; the first starts at the stream's offset with the magic.
    ``tail_offset`` is the offset for :func:`encode_tail`'s bytes, which have to describe
    ``configuration``.
    """

    blocks: tuple[BlockLayout, ...]
    pieces: tuple[Piece, ...]
    tail_offset: int
    configuration: configuration.Configuration


def encode_head(
    machine: str,
    specs: Sequence[BlockSpec],
    *,
    offset: int = 0,
    target_page_bits: int | None = None,
    uuid: bytes | None = None,
    left_out: Collection[str] | None = None,
    before: bytes = b"",
) -> Head:
    """Lay out ``specs`` in this order, in a stream that starts at absolute ``offset`` bytes.

    machine: the machine type; any machine accepts an empty one.
    target_page_bits: for the targets that expect it: ARM machines with 4 KiB pages expect 12,
        x86 refuses it (docs/internals/format.md, "Configuration" and "Page size").
    uuid: the guest's, 16 bytes, for a loading QEMU that validates it.
    left_out: the names of external blocks; None if x-ignore-shared is off in the writer, and has
        to be off in the reader.
    before: encoded elements that precede RAM's.

    Raises :class:`UsageError` if names repeat, page sizes differ or do not match
    ``target_page_bits``, or a value does not fit its field.
    """
    if offset < 0:
        raise UsageError(f"the stream's offset must not be negative, and is {offset}")
    capabilities = () if left_out is None else (configuration.IGNORE_SHARED,)
    settings = configuration.Configuration(
        machine, (*capabilities, configuration.MAPPED_RAM), target_page_bits, uuid
    )
    data = encode_front(settings, specs, before)
    pieces, blocks = [], []
    position = offset
    for spec in specs:
        entry, layout = encode_entry(
            spec,
            position + len(data),
            ignore_shared=left_out is not None,
            external=spec.name in (left_out or ()),
        )
        pieces.append(Piece(position, data + entry))
        blocks.append(layout)
        position, data = layout.pages_end, b""
    if data:
        pieces.append(Piece(position, data))
    return Head(tuple(blocks), tuple(pieces), position + len(data), settings)


def encode_tail(
    *,
    settings: configuration.Configuration | None = None,
    sections: bytes = b"",
    description: bytes | None = None,
    switchover_start: bool = False,
    page_size: int = 4096,
) -> bytes:
    """Return the bytes from the last block's pages to the end of the stream.

    settings: the configuration in the stream's head, which is put into the description.
    sections: encoded device sections with their footers.
    description: the JSON with their lengths. Without sections the default is a description of no
        devices with this ``page_size`` (bytes), so that the file is recognisably complete, as QEMU's
        files are. With sections and no description, none is written: QEMU warns and loads.
    switchover_start: add the COMMAND that QEMU 10.0 and later write for machine types of 10.0 and
        later. Older versions refuse it, and none needs it.
    """
    part = encode_part_header() + RAM_EOS
    return (
        RAM_EOS
        + part
        + encode_end(
            settings=settings,
            sections=sections,
            description=description,
            switchover_start=switchover_start,
            page_size=page_size,
        )
    )


def encode_front(
    settings: configuration.Configuration, specs: Sequence[BlockSpec], before: bytes = b""
) -> bytes:
    """Return the start of a stream of either form, up to the first block's entry.

    ``before`` are encoded elements that precede RAM's.

    Raises :class:`UsageError` if the blocks do not fit together.
    """
    _check_blocks(specs, settings.target_page_bits)
    return b"".join(
        (
            PREAMBLE.pack(MAGIC, VERSION, TYPE_CONFIGURATION),
            configuration.encode(settings),
            before,
            SECTION_ID.pack(SectionKind.START.value, RAM_SECTION_ID),
            bytes([len(RAM_NAME)]) + RAM_NAME.encode(),
            INSTANCE.pack(RAM_INSTANCE, RAM_VERSION),
            WORD.pack(sum(spec.length for spec in specs) | FLAG_MEM_SIZE),
        )
    )


def _check_blocks(specs: Sequence[BlockSpec], target_page_bits: int | None) -> None:
    page_size = None
    if target_page_bits is not None:
        if not 10 <= target_page_bits <= 16:
            raise UsageError(f"target_page_bits must be 10 to 16, not {target_page_bits}")
        page_size = 1 << target_page_bits
    names = set()
    for spec in specs:
        if spec.name in names:
            raise UsageError(f"duplicate block name {spec.name!r}")
        names.add(spec.name)
        page_size = page_size or spec.page_size
        if spec.page_size != page_size:
            raise UsageError(
                f"block {spec.name!r} has pages of {spec.page_size} bytes, others of {page_size}"
            )
    total = sum(spec.length for spec in specs)
    if total > OFFSET_MAX:
        raise UsageError(f"{total} bytes of RAM do not fit in a file")


def encode_part_header() -> bytes:
    """Return the start of a PART of RAM; :data:`RAM_EOS` ends it."""
    return SECTION_ID.pack(SectionKind.PART.value, RAM_SECTION_ID)


def encode_ram_end() -> bytes:
    """Return the END of RAM, without pages."""
    return SECTION_ID.pack(SectionKind.END.value, RAM_SECTION_ID) + RAM_EOS


def encode_end(
    *,
    settings: configuration.Configuration | None = None,
    sections: bytes,
    description: bytes | None,
    switchover_start: bool,
    page_size: int,
) -> bytes:
    """Return the bytes after the last PART of RAM; arguments as in :func:`encode_tail`."""
    if description is None and not sections:
        description = no_devices(page_size)
    parts = [
        COMMAND.pack(SectionKind.COMMAND.value, COMMAND_SWITCHOVER_START, 0)
        if switchover_start
        else b"",
        encode_ram_end(),
        sections,
        bytes([TYPE_EOF]),
    ]
    if description is not None:
        if settings is not None:
            description = with_configuration(description, settings)
        parts.append(encode_description(description))
    return b"".join(parts)
