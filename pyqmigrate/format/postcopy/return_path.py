"""What the destination of a post-copy migration sends back.

Each message is ``u16 type, u16 length, body``, big-endian (docs/internals/format.md, "Post-copy")::

    1 SHUT            u32 status: 0 if all is well
    2 PONG            u32 of the PING
    3 REQUEST         u64 offset, u32 length, str8 block
    4 REQUEST         u64 offset, u32 length, of the block of the last request
    5 RECEIVED        str8 block; after the message u64 size, so many bytes of bits, u64 end mark
    6 RESUMED         u32: 1 if it goes on
    7 SWITCHOVER_ACK

The destination is untrusted: it is a program that runs a guest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from pyqmigrate.errors import QemuError
from pyqmigrate.format.postcopy.stream import PostcopyBlock

__all__ = ["Message", "Pong", "Received", "Request", "Resumed", "ReturnPath", "Shut"]

_HEADER = struct.Struct(">HH")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_RANGE = struct.Struct(">QI")
_END_MARK = 0x0123456789ABCDEF
_SHUT, _PONG, _NAMED, _SAME, _RECEIVED, _RESUMED, _SWITCHOVER = range(1, 8)
_LENGTHS = {_SHUT: 4, _PONG: 4, _SAME: _RANGE.size, _RESUMED: 4, _SWITCHOVER: 0}


@dataclass(frozen=True, slots=True)
class Shut:
    """The destination has everything, or has failed; ``status`` 0 if all is well."""

    status: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a PING."""

    value: int


@dataclass(frozen=True, slots=True)
class Request:
    """The destination waits for pages ``[first, first + npages)`` of a block."""

    block: str
    first: int
    npages: int


@dataclass(frozen=True, slots=True)
class Received:
    """The pages of a block that have arrived: page ``k`` is bit ``k % 8`` of byte ``k // 8``."""

    block: str
    bits: bytes


@dataclass(frozen=True, slots=True)
class Resumed:
    """The answer to RESUME; ``value`` 1 if it goes on."""

    value: int


Message: TypeAlias = Shut | Pong | Request | Received | Resumed


class ReturnPath:
    """A reader of the return path of one connection. ``last_block`` is the block of the latest request;
    set it if another reader took requests in between."""

    def __init__(self, blocks: Mapping[str, PostcopyBlock]) -> None:
        self._blocks = blocks
        self._data = bytearray()
        self.last_block: str | None = None
        self._seen = 0

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that ``data`` completes. QemuError for what cannot be one: nothing can be
        read after it."""
        self._data += data
        while (found := self._next()) is not None:
            length, message = found
            del self._data[:length]
            self._seen += length
            if message is not None:
                yield message

    @property
    def incomplete(self) -> bool:
        """Whether the start of a message is kept: what is received next belongs to it."""
        return bool(self._data)

    def _next(self) -> tuple[int, Message | None] | None:
        """Return the length of the next message and the message; None if it is not complete."""
        data = self._data
        if len(data) < _HEADER.size:
            return None
        kind, length = _HEADER.unpack_from(data)
        expected = _LENGTHS.get(kind)
        if expected is None and kind not in (_NAMED, _RECEIVED):
            raise self._fault(f"a message of unknown type {kind}")
        if expected is not None and length != expected:
            raise self._fault(f"a message of type {kind} with {length} bytes, expected {expected}")
        longest = _RANGE.size + 256 if kind == _NAMED else 256
        if length > longest:
            raise self._fault(f"a message of type {kind} with {length} bytes")
        end = _HEADER.size + length
        if len(data) < end:
            return None
        body = bytes(data[_HEADER.size : end])
        if kind == _RECEIVED:
            return self._received(body, end)
        return end, self._decode(kind, body)

    def _decode(self, kind: int, body: bytes) -> Message | None:
        if kind == _SHUT:
            return Shut(_U32.unpack(body)[0])
        if kind == _PONG:
            return Pong(_U32.unpack(body)[0])
        if kind == _RESUMED:
            return Resumed(_U32.unpack(body)[0])
        if kind == _SWITCHOVER:
            return None
        if len(body) < _RANGE.size:
            raise self._fault(f"a request of {len(body)} bytes")
        if kind == _NAMED:
            self.last_block = self._name(body[_RANGE.size :])
        if self.last_block is None:
            raise self._fault("a request for pages of the last block before any block")
        return self._request(self.last_block, *_RANGE.unpack_from(body))

    def _request(self, name: str, start: int, length: int) -> Request:
        block = self._blocks[name]
        size = block.host_page_size
        if start % size or length % size or length == 0 or start + length > block.spec.length:
            raise self._fault(
                f"a request for {length} bytes at {start:#x} of block {name!r}, which has "
                f"{block.spec.length} bytes in pages of {size}"
            )
        return Request(name, start // block.spec.page_size, length // block.spec.page_size)

    def _received(self, body: bytes, end: int) -> tuple[int, Message] | None:
        name = self._name(body)
        data = self._data
        if len(data) < end + _U64.size:
            return None
        (size,) = _U64.unpack_from(data, end)
        spec = self._blocks[name].spec
        least = (spec.length // spec.page_size + 7) // 8
        if not least <= size <= (least + 7) // 8 * 8:
            raise self._fault(f"{size} bytes of bits for block {name!r}, expected {least}")
        bits = end + _U64.size
        if len(data) < bits + size + _U64.size:
            return None
        if _U64.unpack_from(data, bits + size)[0] != _END_MARK:
            raise self._fault(f"the bits of block {name!r} do not end with their mark")
        return bits + size + _U64.size, Received(name, bytes(data[bits : bits + size]))

    def _name(self, data: bytes) -> str:
        if not data or data[0] != len(data) - 1:
            raise self._fault("a block name whose length does not fit the message")
        name = data[1:].decode("utf-8", "surrogateescape")
        if name not in self._blocks:
            raise self._fault(f"block {name!r}, which the snapshot does not have")
        return name

    def _fault(self, what: str) -> QemuError:
        return QemuError(f"the destination sent {what}, at byte {self._seen} of the return path")
