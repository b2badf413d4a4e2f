"""What the source of a post-copy migration sends, apart from pages.

The destination runs before its memory is there, and asks for the pages that it touches. Big-endian
throughout (docs/internals/format.md, "Post-copy")::

    head      preamble, configuration, OPEN_RETURN_PATH, PING 1, ADVISE, START of RAM with the blocks,
              sections that precede RAM's pages, a DISCARD
    package   PACKAGED u32 length: LISTEN, device sections, PING 3, RUN
    PART ...  page records (:mod:`~pyqmigrate.format.postcopy.records`)
    END

QEMU answers PING 3 when the package has been loaded: a connection that breaks later can be replaced, with
:func:`ask_received` for each block, and :data:`RESUME`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pyqmigrate.errors import UsageError
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.configuration import Configuration
from pyqmigrate.format.stream.wire import COMMAND, COMMAND_PACKAGED, TYPE_EOF, WORD, SectionKind
from pyqmigrate.format.stream.writer import RAM_EOS, encode_front, encode_ram_end

__all__ = [
    "END",
    "HEAD_PING",
    "LOADED_PING",
    "PACKAGE_MAX",
    "RESUME",
    "PostcopyBlock",
    "ask_received",
    "encode_head",
    "encode_package",
]

HEAD_PING = 1
LOADED_PING = 3
PACKAGE_MAX = 1 << 24  # bytes that QEMU accepts (MAX_VM_CMD_PACKAGED_SIZE)

_OPEN_RETURN_PATH, _PING, _ADVISE, _LISTEN, _RUN, _DISCARD, _RESUME, _RECEIVED = (
    1,
    2,
    3,
    4,
    5,
    6,
    9,
    10,
)
_USUAL_PAGE_SIZE = 4096  # a block with other host pages states their size
_PAIR = struct.Struct(">QQ")
_U32 = struct.Struct(">I")


@dataclass(frozen=True)
class PostcopyBlock:
    """A RAM block; ``host_page_size`` is that of its memory in the destination, in bytes: 4096, or that
    of hugetlbfs."""

    spec: BlockSpec
    host_page_size: int = _USUAL_PAGE_SIZE

    def __post_init__(self) -> None:
        size, page_size = self.host_page_size, self.spec.page_size
        if size < page_size or size & (size - 1) or self.spec.length % size:
            raise UsageError(
                f"block {self.spec.name!r}, {self.spec.length} bytes in pages of {page_size}, cannot be in "
                f"memory with pages of {size} bytes"
            )

    @property
    def pages_together(self) -> int:
        """How many pages of the guest are one page of the destination's memory."""
        return self.host_page_size // self.spec.page_size


def _command(number: int, payload: bytes = b"") -> bytes:
    return COMMAND.pack(SectionKind.COMMAND.value, number, len(payload)) + payload


def _name(name: str) -> bytes:
    data = name.encode("utf-8", "surrogateescape")
    return bytes([len(data)]) + data


RESUME = _command(_RESUME)
END = encode_ram_end() + bytes([TYPE_EOF])


def encode_head(
    settings: Configuration, blocks: Sequence[PostcopyBlock], early: bytes = b""
) -> bytes:
    """Return everything before the package.

    ``settings`` have no capabilities. ``early`` are sections, as they were saved, that precede RAM's
    pages, and those of live devices besides RAM.
    """
    if not blocks:
        raise UsageError("there is no RAM block to send")
    summary = 0
    for block in blocks:
        summary |= block.host_page_size
    page_size = blocks[0].spec.page_size
    before = (
        _command(_OPEN_RETURN_PATH)
        + _command(_PING, _U32.pack(HEAD_PING))
        + _command(_ADVISE, _PAIR.pack(summary, page_size))
    )
    parts = [encode_front(settings, [block.spec for block in blocks], before)]
    for block in blocks:
        parts += [_name(block.spec.name), WORD.pack(block.spec.length)]
        if block.host_page_size != _USUAL_PAGE_SIZE:
            parts.append(WORD.pack(block.host_page_size))
    # QEMU refuses to run after LISTEN if nothing was ever discarded.
    first = blocks[0]
    discarded = b"\0" + _name(first.spec.name) + b"\0" + _PAIR.pack(0, first.host_page_size)
    return b"".join((*parts, RAM_EOS, early, _command(_DISCARD, discarded)))


def encode_package(devices: bytes) -> bytes:
    """Return the package, with the device sections as they were saved. UsageError if QEMU would refuse
    it as too long."""
    content = _command(_LISTEN) + devices + _command(_PING, _U32.pack(LOADED_PING)) + _command(_RUN)
    if len(content) > PACKAGE_MAX:
        raise UsageError(
            f"{len(devices)} bytes of device state are too long for a post-copy migration: QEMU takes "
            f"{PACKAGE_MAX}"
        )
    return _command(COMMAND_PACKAGED, _U32.pack(len(content))) + content


def ask_received(block: str) -> bytes:
    """Return the question which pages of a block have arrived."""
    return _command(_RECEIVED, _name(block))
