"""Streams and byte sources made for tests, from the wire up."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.writer import Head, encode_head, encode_tail

DESCRIPTION = {
    "configuration": {"vmsd_name": "configuration", "version": 1, "fields": []},
    "page_size": 4096,
    "devices": [],
}


class Sparse:
    """A file of pieces at offsets, zero between them, that counts what is read from it."""

    def __init__(self, pieces: Iterable[tuple[int, bytes]], size: int | None = None) -> None:
        self.pieces = sorted(pieces)
        self.size = max(o + len(d) for o, d in self.pieces) if size is None else size
        self.bytes_read = 0

    def read_at(self, offset: int, length: int) -> bytes:
        assert offset >= 0 and length >= 0
        length = max(0, min(length, self.size - offset))
        self.bytes_read += length
        data = bytearray(length)
        for start, piece in self.pieces:
            low, high = max(start, offset), min(start + len(piece), offset + length)
            if low < high:
                data[low - offset : high - offset] = piece[low - start : high - start]
        return bytes(data)

    def patched(self, offset: int, data: bytes) -> Sparse:
        """A copy with ``data`` written at ``offset``."""
        pieces = []
        for start, piece in self.pieces:
            low, high = max(start, offset), min(start + len(piece), offset + len(data))
            if low < high:
                middle = data[low - offset : high - offset]
                piece = piece[: low - start] + middle + piece[high - start :]
            pieces.append((start, piece))
        return Sparse(pieces, self.size)

    def cut(self, size: int) -> Sparse:
        """A copy that ends at ``size``."""
        return Sparse(((o, d[: size - o]) for o, d in self.pieces if o < size), size)


def file_of(head: Head, tail: bytes, prefix: bytes = b"") -> Sparse:
    """The framing of a snapshot as a file, its pages and bitmaps zero."""
    pieces = [(piece.offset, piece.data) for piece in head.pieces] + [(head.tail_offset, tail)]
    return Sparse([(0, prefix), *pieces])


def snapshot(*specs: BlockSpec, offset: int = 0, **tail: object) -> Sparse:
    """A file of the given blocks (one of 64 KiB if none) written by the package."""
    blocks = specs or (BlockSpec("pc.ram", 65536),)
    return file_of(encode_head("pc", blocks, offset=offset), encode_tail(**tail))  # type: ignore[arg-type]


def str8(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return bytes([len(data)]) + data


def words(*values: int) -> bytes:
    return b"".join(struct.pack(">Q", value) for value in values)


def footer(section_id: int) -> bytes:
    return struct.pack(">BI", 0x7E, section_id)


def start(section_id: int, name: str, version: int, body: bytes, *, instance: int = 0) -> bytes:
    ids = struct.pack(">II", instance, version)
    return struct.pack(">BI", 1, section_id) + str8(name) + ids + body + footer(section_id)


def part(section_id: int, body: bytes) -> bytes:
    return struct.pack(">BI", 2, section_id) + body + footer(section_id)


def end(section_id: int, body: bytes) -> bytes:
    return struct.pack(">BI", 3, section_id) + body + footer(section_id)


def full(section_id: int, name: str, body: bytes, *, instance: int = 0) -> bytes:
    ids = struct.pack(">II", instance, 1)
    return struct.pack(">BI", 4, section_id) + str8(name) + ids + body + footer(section_id)


def command(number: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BHH", 8, number, len(payload)) + payload


def device(name: str, size: int, *, instance: int = 0) -> dict[str, object]:
    """A device's entry in the description, in the old style with one field."""
    data = {"name": "data", "size": size, "type": "buffer"}
    return {"name": name, "instance_id": instance, "size": size, "fields": [data]}


def described(*devices: dict[str, object]) -> bytes:
    return json.dumps(DESCRIPTION | {"devices": list(devices)}).encode()


RAM_EOS = words(0x10)
EOF = b"\0"


def page_records(page_size: int = 4096, name: str = "pc.ram") -> bytes:
    """Records of a sequential stream: a page of ones, then a zero page, in a block of this name."""
    whole = words(0x08) + str8(name) + b"\1" * page_size
    return whole + words(page_size | 0x02 | 0x20) + b"\0"


def sequential_stream(
    records: bytes = b"",
    *,
    length: int = 65536,
    name: str = "pc.ram",
    subsections: bytes = b"",
    address: bytes = b"",
    devices: bytes = b"",
    description: bytes | None = described(),
) -> bytes:
    """A sequential stream with one block, and all its records in one PART."""
    entry = words(length | 0x04) + str8(name) + words(length) + address
    stream = (
        b"QEVM"
        + struct.pack(">IBI", 3, 7, 2)
        + b"pc"
        + subsections
        + start(1, "ram", 4, entry + RAM_EOS)
        + part(1, records + RAM_EOS)
        + end(1, RAM_EOS)
        + devices
        + EOF
    )
    if description is not None:
        stream += struct.pack(">BI", 6, len(description)) + description
    return stream


@dataclass
class Raw:
    """A stream written field by field, so that a test can bend each of them.

    ``before`` and ``inside`` are elements before RAM's START, and between START and END.
    """

    machine: bytes = b"pc"
    capabilities: tuple[str, ...] = ("mapped-ram",)
    subsections: bytes | None = None
    before: bytes = b""
    total: int = 65536
    ram_name: str = "ram"
    ram_version: int = 4
    ram_id: int = 1
    name: bytes = b"pc.ram"
    length: int = 65536
    gpa: bytes = b""
    header_version: int = 1
    page_size: int = 4096
    bitmap_offset: int | None = None
    pages_offset: int = 1 << 20
    inside: bytes = b""
    ram_end: bytes | None = None
    devices: bytes = b""
    description: bytes | None = field(default_factory=described)
    size: int | None = None

    def file(self) -> Sparse:
        listed = b"".join(map(str8, self.capabilities))
        configuration = (
            b"\x05"
            + str8("configuration/capabilities")
            + struct.pack(">II", 1, len(self.capabilities))
            + listed
            if self.subsections is None
            else self.subsections
        )
        head = (
            b"QEVM"
            + struct.pack(">IBI", 3, 7, len(self.machine))
            + self.machine
            + configuration
            + self.before
            + struct.pack(">BI", 1, self.ram_id)
            + str8(self.ram_name)
            + struct.pack(">II", 0, self.ram_version)
            + words(self.total | 4)
            + str8(self.name)
            + words(self.length)
            + self.gpa
        )
        at = len(head) + 28
        bitmap = at if self.bitmap_offset is None else self.bitmap_offset
        head += struct.pack(">IQQQ", self.header_version, self.page_size, bitmap, self.pages_offset)
        ended = end(self.ram_id, RAM_EOS) if self.ram_end is None else self.ram_end
        tail = RAM_EOS + footer(self.ram_id) + self.inside + ended + self.devices + EOF
        if self.description is not None:
            tail += struct.pack(">BI", 6, len(self.description)) + self.description
        external = bitmap == self.pages_offset == 0
        after = at if external else self.pages_offset + self.length
        if after > 1 << 62:
            after = at
        return Sparse([(0, head), (after, tail)], self.size)


def configured(*subsections: bytes, machine: bytes = b"pc") -> bytes:
    return b"QEVM" + struct.pack(">IBI", 3, 7, len(machine)) + machine + b"".join(subsections)


def capabilities(*names: str) -> bytes:
    head = b"\x05" + str8("configuration/capabilities") + struct.pack(">II", 1, len(names))
    return head + b"".join(map(str8, names))


def blocks(*entries: bytes, total: int, section_id: int = 1) -> bytes:
    return start(section_id, "ram", 4, words(total | 4) + b"".join(entries) + RAM_EOS)


def entry(name: str, length: int, gpa: bytes = b"") -> bytes:
    return str8(name) + words(length) + gpa


def described_as(text: bytes) -> bytes:
    return struct.pack(">BI", 6, len(text)) + text
