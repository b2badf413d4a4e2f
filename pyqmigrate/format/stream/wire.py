"""The elements of a migration stream: their wire forms, and their parsed values.

The grammar, big-endian throughout (docs/internals/format.md, "The stream"); ``S`` is the offset
at which the stream starts::

    S        "QEVM", u32 version = 3
             0x07 configuration
             elements: START, PART, END, FULL, COMMAND
             0x00                                            end of stream
             0x06 u32 length, JSON                           description; may be missing

    START    0x01 u32 id, str8 name, u32 instance, u32 version, body, footer
    PART     0x02 u32 id, body, footer
    END      0x03 u32 id, body, footer
    FULL     0x04 like START: a device's whole state
    COMMAND  0x08 u16 command, u16 length, payload
    footer   0x7E u32 id

    RAM body of START    u64 total | 4, the blocks, u64 0x10
    RAM body of PART     u64 0x10
    RAM body of END      u64 0x10; written after the bitmaps

A body has no length: RAM's is parsed, a device's length comes from the description. The stream
jumps over each block's bitmap and pages (:mod:`~pyqmigrate.format.stream.mapped_ram`).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyqmigrate.format.stream.mapped_ram import BlockLayout

__all__ = ["MAGIC", "Section", "SectionKind", "Stream", "after_ram"]

MAGIC = b"QEVM"
VERSION = 3

TYPE_EOF = 0x00
TYPE_CONFIGURATION = 0x07

PREAMBLE = struct.Struct(">4sIB")  # magic, version, type of the configuration
SECTION_ID = struct.Struct(">BI")  # type, section id: starts PART and END, and is the footer
INSTANCE = struct.Struct(">II")  # instance id, version id: ends the header of START and FULL
COMMAND = struct.Struct(">BHH")  # type, command, length of the payload
FOOTER_TYPE = 0x7E

RAM_NAME, RAM_INSTANCE, RAM_VERSION = "ram", 0, 4
WORD = struct.Struct(">Q")
FLAG_MEM_SIZE = 0x04
FLAG_EOS = 0x10

COMMAND_PACKAGED = 7
COMMAND_SWITCHOVER_START = 11
COMMAND_NAMES = {
    1: "open-return-path",
    2: "ping",
    3: "postcopy-advise",
    4: "postcopy-listen",
    5: "postcopy-run",
    6: "postcopy-discard",
    COMMAND_PACKAGED: "packaged",
    8: "enable-colo",
    9: "postcopy-resume",
    10: "recv-bitmap",
    COMMAND_SWITCHOVER_START: "switchover-start",
}


class SectionKind(enum.Enum):
    """The elements that a reader returns; the value is the type byte."""

    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    COMMAND = 0x08


class Section(NamedTuple):
    """One element of a stream. Offsets are absolute in the file, lengths in bytes.

    ``offset`` is that of the type byte, ``length`` covers the whole element with its footer;
    RAM's START covers the pages, since the stream jumps over them. PART and END repeat the name
    and ids of their START. A COMMAND has no section id (None), its name is that of the command,
    its body the payload.
    """

    kind: SectionKind
    section_id: int | None
    name: str
    instance_id: int
    version_id: int
    offset: int
    length: int
    body_offset: int
    body_length: int


class Stream(NamedTuple):
    """A parsed and checked mapped-ram stream. Offsets are absolute in the file.

    - ``capabilities``: those that affect the format, as listed. ``target_page_bits``, ``uuid``:
      None if the stream does not state them.
    - ``total_ram``: bytes, external blocks included.
    - ``sections``: in the order of the stream, as far as it could be read. After the first 65536,
      PARTs are left out: a live save can have millions.
    - ``description``: the parsed JSON, or None; ``description_offset`` that of its type byte.
    - ``ram_end``: the offset of RAM's END element, or of the first device section of a background
      snapshot.
    - ``background``: QEMU wrote it with ``background-snapshot`` and no other program has completed
      it: it has no END of RAM, and its bitmaps were never written.
    - ``end``: the offset after the stream; the file's size if the end was not found.
    - ``opaque_tail``: the device state could not be read to its end (it is cut off, or does not fit
      its description); ``sections`` ends before it.
    - ``complete``: the end of the stream was found, by its end-of-stream byte or by a description
      at the end of the file. If False, device state may be cut off; RAM is complete in either case,
      as far as the format can show.
    """

    machine: str
    capabilities: tuple[str, ...]
    target_page_bits: int | None
    uuid: bytes | None
    total_ram: int
    blocks: tuple[BlockLayout, ...]
    sections: tuple[Section, ...]
    description: dict[str, Any] | None
    description_offset: int | None
    ram_end: int
    end: int
    complete: bool
    opaque_tail: bool
    mapped_ram: bool = True
    background: bool = False

    @property
    def after_ram(self) -> int:
        """The offset of the first element after RAM."""
        return after_ram(self.sections, self.ram_end, self.background)


def after_ram(sections: Sequence[Section], ram_end: int, background: bool) -> int:
    """Return the offset after RAM END, which is at ``ram_end``; a background snapshot has none."""
    if background:
        return ram_end
    end = next(section for section in sections if section.offset == ram_end)
    return end.offset + end.length
