"""The first line of the binary files beside a snapshot: kind, snapshot, blocks and digest.

``SNAPSHOT.pages`` (:mod:`pyqmigrate.format.page_table`) and ``SNAPSHOT.workingset``
(:mod:`pyqmigrate.format.working_set`) start in the same way: one line of JSON, padded with spaces to a
multiple of 4096 bytes, its newline included; then the body, and nothing after it. The JSON is an
object of these keys, in this order; readers step over others between the first and the last::

    format      the kind of the file, by which its first bytes are known
    version     1
    snapshot    object of size (bytes), mtime_ns (nanoseconds since 1970) and seal (32 hexadecimal
                digits, the digest of its seal; null if it has none): the file that this belongs to
    blocks      list of objects of name, length and page_size (bytes): its RAM blocks
    ...         keys of the kind
    digest      32 hexadecimal digits: xxh3-128 of the body, followed by the line up to the comma
                before this key
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm, Data, digest_of_all
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import BLOCKS_MAX, OFFSET_MAX

__all__ = ["LINE_MAX", "CompanionKind", "CompanionLine", "SnapshotId", "read_number"]

LINE_MAX = 8 << 20  # bytes, the newline included
_ALIGNMENT = 4096  # bytes: the body can be mapped
_VERSION = 1
_END = b', "digest": "%s"}'


@dataclass(frozen=True)
class CompanionKind:
    """A kind of file: ``name`` is its ``format``, ``noun`` names it in messages (``page table``), and
    ``field`` in the errors."""

    name: str
    noun: str

    @property
    def start(self) -> bytes:
        """The first bytes of such a file."""
        return b'{"format": "' + self.name.encode("ascii") + b'"'

    def is_ours(self, data: bytes) -> bool:
        """Whether a file that starts with ``data`` (64 bytes of it) is, or was, one of this kind."""
        return data.startswith(self.start)

    def fault(self, message: str, offset: int | None = None) -> SnapshotError:
        return SnapshotError(f"{message} in the {self.noun}", field=self.noun, offset=offset)


@dataclass(frozen=True)
class CompanionLine:
    """The line that was read or is to be written. ``more`` has the keys of the kind."""

    kind: CompanionKind
    snapshot: SnapshotId
    blocks: tuple[BlockSpec, ...]
    more: dict[str, Any]
    digest: bytes = bytes(DIGEST_SIZE)
    front: bytes = b""
    length: int = 0

    def encode(self, body: Iterable[Data]) -> bytes:
        """Return the line, its padding and newline included, for this body.

        Raises UsageError where it would be longer than a reader takes.
        """
        seal = self.snapshot.seal
        value: dict[str, Any] = {
            "format": self.kind.name,
            "version": _VERSION,
            "snapshot": {
                "size": self.snapshot.size,
                "mtime_ns": self.snapshot.mtime_ns,
                "seal": None if seal is None else seal.hex(),
            },
            "blocks": [
                {"name": block.name, "length": block.length, "page_size": block.page_size}
                for block in self.blocks
            ],
        }
        front = json.dumps(value | self.more).encode("ascii")[:-1]
        digest = digest_of_all(Algorithm.XXH3_128, chain(body, [front]))
        text = front + _END % digest.hex().encode("ascii")
        length = -(-(len(text) + 1) // _ALIGNMENT) * _ALIGNMENT
        if length > LINE_MAX:
            raise UsageError(f"the first line of the {self.kind.noun} would have {length} bytes")
        return text.ljust(length - 1) + b"\n"

    @classmethod
    def decode(cls, kind: CompanionKind, data: bytes) -> CompanionLine:
        """Read the line from the first :data:`LINE_MAX` bytes of a file.

        Raises SnapshotError for an invalid line. The digest is checked by :meth:`check`.
        """
        text, newline, _ = data[:LINE_MAX].partition(b"\n")
        length = len(text) + len(newline)
        if not kind.is_ours(text):
            raise kind.fault("wrong first bytes", 0)
        if not newline or length % _ALIGNMENT:
            raise kind.fault("the first line has a wrong length", len(text))
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise kind.fault("the first line is not JSON") from error
        if not isinstance(value, dict):
            raise kind.fault("the first line is not an object")
        if read_number(kind, value, "version") != _VERSION:
            raise kind.fault(f"version {value['version']} is not supported, only {_VERSION}")
        digest = _read_digest(kind, value, "digest")
        if digest is None or not text.rstrip(b" ").endswith(_END % digest.hex().encode("ascii")):
            raise kind.fault("the first line does not end with its digest")
        snapshot = value.get("snapshot")
        if not isinstance(snapshot, dict):
            raise kind.fault("the snapshot is missing")
        listed = value.get("blocks")
        if not isinstance(listed, list) or len(listed) > BLOCKS_MAX:
            raise kind.fault(f"expected a list of at most {BLOCKS_MAX} blocks")
        blocks = tuple(_read_block(kind, number, block) for number, block in enumerate(listed))
        if len({block.name for block in blocks}) != len(blocks):
            raise kind.fault("duplicate block name")
        if sum(block.length for block in blocks) > OFFSET_MAX:
            raise kind.fault("the blocks together are longer than a file can be")
        identity = SnapshotId(
            read_number(kind, snapshot, "size"),
            read_number(kind, snapshot, "mtime_ns", negative=True),
            _read_digest(kind, snapshot, "seal"),
        )
        front = text.rstrip(b" ")[: -len(_END % (b"0" * 2 * DIGEST_SIZE))]
        return cls(kind, identity, blocks, value, digest, front, length)

    def check(self, body: Iterable[Data]) -> None:
        """Raise SnapshotError unless this is the body, and the line is as it was written."""
        if digest_of_all(Algorithm.XXH3_128, chain(body, [self.front])) != self.digest:
            raise self.kind.fault("damaged: the digest does not match")


def read_number(
    kind: CompanionKind, value: dict[str, Any], key: str, *, negative: bool = False
) -> int:
    """Return the whole number, of 63 bits, at ``key``. Raises SnapshotError."""
    number = value.get(key)
    if isinstance(number, bool) or not isinstance(number, int):
        raise kind.fault(f"{key} is not a whole number")
    if not (-OFFSET_MAX if negative else 0) <= number <= OFFSET_MAX:
        raise kind.fault(f"{key} is out of its range")
    return number


def _read_digest(kind: CompanionKind, value: dict[str, Any], key: str) -> bytes | None:
    text = value.get(key)
    if text is None:
        return None
    try:
        digest = bytes.fromhex(text)
    except (ValueError, TypeError) as error:
        raise kind.fault(f"{key} is not a digest") from error
    if len(digest) != DIGEST_SIZE:
        raise kind.fault(f"{key} has {len(digest)} bytes")
    return digest


def _read_block(kind: CompanionKind, number: int, value: Any) -> BlockSpec:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise kind.fault(f"blocks[{number}] has no name")
    length, page_size = read_number(kind, value, "length"), read_number(kind, value, "page_size")
    try:
        return BlockSpec(value["name"], length, page_size)
    except UsageError as error:
        raise kind.fault(f"blocks[{number}]: {error}") from error
