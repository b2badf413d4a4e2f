"""The first line of a stored snapshot: what is listed without reading the rest.

One line of JSON, ended by a newline, at most 1 MiB long: an object of these keys, in this order;
readers step over others between the first and the last::

    format      "pyqmigrate-stored-snapshot"
    version     1
    name        of the snapshot, as in its key
    size        of the file that is shown, bytes
    mtime_ns    its time of change, which its seal names: nanoseconds since 1970
    machine     its machine type, "" if the stream does not record one
    uuid        of the guest, 32 hexadecimal digits; null if the stream does not record one
    added_ns    when it was stored: nanoseconds since 1970
    parent      name of the stored snapshot that it was compared with, or null
    source      what was added: "mapped-ram", "sequential", "increment" or "libvirt"
    labels      object of texts, given by the user
    blocks      list of objects of name, length and page_size: its RAM blocks
    counts      object of numbers: pages (stored ones), same_pages (of one 8-byte word), new_pages
                (that no pack had), new_bytes (the packs that were written for it)
    packs       number of packs that it needs
    body        length of the compressed body, bytes
    body_size   length of the body, bytes
    digest      32 hexadecimal digits: keyed digest of the line up to the comma before this key
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.seal import SEALED_MAX
from pyqmigrate.format.store.keyed import keyed_digest
from pyqmigrate.format.store.keys import is_name
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import BLOCKS_MAX, OFFSET_MAX

__all__ = [
    "BODY_MAX",
    "HEAD_MAX",
    "LABELS_MAX",
    "SOURCES",
    "Counts",
    "HeadLine",
    "SnapshotHead",
    "check_labels",
    "fault",
]

HEAD_MAX = 1 << 20  # bytes, the newline included
BODY_MAX = 1 << 30  # bytes, not compressed; the same for the compressed body
LABELS_MAX = 1 << 14  # characters of all labels
SOURCES = ("mapped-ram", "sequential", "increment", "libvirt")

_FORMAT = "pyqmigrate-stored-snapshot"
_VERSION = 1
_PACKS_MAX = 1 << 26
_TEXT_MAX = 255


@dataclass(frozen=True)
class Counts:
    """``pages`` are stored in packs, ``same_pages`` repeat one word; ``new_pages`` were in no pack
    before, and ``new_bytes`` is the size of the packs that were written for them."""

    pages: int = 0
    same_pages: int = 0
    new_pages: int = 0
    new_bytes: int = 0


@dataclass(frozen=True)
class SnapshotHead:
    """What a stored snapshot is. See the module for the values."""

    name: str
    size: int
    mtime_ns: int
    machine: str
    uuid: bytes | None
    added_ns: int
    parent: str | None
    source: str
    labels: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[BlockSpec, ...] = ()
    counts: Counts = Counts()

    def encode(self, key: bytes, packs: int, body: int, body_size: int) -> bytes:
        """Return the line. Raises UsageError if it would be longer than HEAD_MAX."""
        value = {
            "format": _FORMAT,
            "version": _VERSION,
            "name": self.name,
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "machine": self.machine,
            "uuid": None if self.uuid is None else self.uuid.hex(),
            "added_ns": self.added_ns,
            "parent": self.parent,
            "source": self.source,
            "labels": dict(self.labels),
            "blocks": [
                {"name": block.name, "length": block.length, "page_size": block.page_size}
                for block in self.blocks
            ],
            "counts": {item.name: getattr(self.counts, item.name) for item in fields(Counts)},
            "packs": packs,
            "body": body,
            "body_size": body_size,
        }
        front = json.dumps(value).encode("ascii")[:-1]
        line = front + _end(keyed_digest(key, [front]))
        if len(line) > HEAD_MAX:
            raise UsageError(f"the first line of {self.name!r} would have {len(line)} bytes")
        return line


@dataclass(frozen=True)
class HeadLine:
    """A decoded line: the head, its length in bytes, and what it says of the body."""

    head: SnapshotHead
    length: int
    packs: int
    body: int
    body_size: int

    @property
    def total(self) -> int:
        """Length of the whole document, bytes."""
        return self.length + self.body + DIGEST_SIZE

    @classmethod
    def decode(cls, key: bytes, data: bytes, name: str) -> HeadLine:
        """Read the line from the first HEAD_MAX bytes of snapshot ``name``.

        Raises SnapshotError if it is damaged, cut off or of another store or name; NotSupported for
        another version.
        """
        line, newline, _ = data[:HEAD_MAX].partition(b"\n")
        if not newline:
            raise fault(name, "its first line does not end")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise fault(name, "its first line is not JSON") from None
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise fault(name, "this is not a stored snapshot")
        if value.get("version") != _VERSION:
            raise NotSupported(
                f"snapshot {name!r} has version {value.get('version')!r:.80}; only {_VERSION} is known"
            )
        front, comma, _ = line.rpartition(b", ")
        if not comma or line + newline != front + _end(keyed_digest(key, [front])):
            raise fault(name, "its first line is damaged, or of another store")
        if value.get("name") != name:
            raise fault(name, f"it was stored as {value.get('name')!r:.250}")
        return cls(
            _head(value, name),
            len(line) + 1,
            _number(value, "packs", name, _PACKS_MAX),
            _number(value, "body", name, BODY_MAX),
            _number(value, "body_size", name, BODY_MAX),
        )


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels. Raises UsageError unless all are texts, LABELS_MAX characters together."""
    if not all(isinstance(text, str) for item in labels.items() for text in item):
        raise UsageError("labels are texts")
    if sum(len(name) + len(text) for name, text in labels.items()) > LABELS_MAX:
        raise UsageError(f"the labels have more than {LABELS_MAX} characters")
    return dict(labels)


def fault(name: str, message: str) -> SnapshotError:
    """Return the error for a damaged stored snapshot."""
    return SnapshotError(message, field=f"stored snapshot {name}")


def _end(digest: bytes) -> bytes:
    return b', "digest": "' + digest.hex().encode("ascii") + b'"}\n'


def _head(value: dict[str, Any], name: str) -> SnapshotHead:
    uuid = value.get("uuid")
    if uuid is not None:
        try:
            uuid = bytes.fromhex(uuid)
        except (ValueError, TypeError):
            uuid = b""
        if len(uuid) != 16:
            raise fault(name, "its uuid does not have 32 hexadecimal digits")
    parent = value.get("parent")
    if parent is not None and not (isinstance(parent, str) and is_name(parent)):
        raise fault(name, "its parent is not the name of a stored snapshot")
    machine, source = value.get("machine"), value.get("source")
    if not isinstance(machine, str) or len(machine) > _TEXT_MAX:
        raise fault(name, "its machine is not a text")
    if not isinstance(source, str) or source not in SOURCES:
        raise fault(name, f"its source is not one of {', '.join(SOURCES)}")
    labels, counts = value.get("labels"), value.get("counts")
    if not isinstance(labels, dict) or not isinstance(counts, dict):
        raise fault(name, "its labels or counts are missing")
    try:
        check_labels(labels)
    except UsageError as error:
        raise fault(name, str(error)) from error
    listed = value.get("blocks")
    if not isinstance(listed, list) or len(listed) > BLOCKS_MAX:
        raise fault(name, f"it has no list of at most {BLOCKS_MAX} blocks")
    return SnapshotHead(
        name,
        _number(value, "size", name, SEALED_MAX),
        _number(value, "mtime_ns", name, negative=True),
        machine,
        uuid,
        _number(value, "added_ns", name, negative=True),
        parent,
        source,
        labels,
        tuple(_block(block, name) for block in listed),
        Counts(*(_number(counts, item.name, name) for item in fields(Counts))),
    )


def _block(value: Any, name: str) -> BlockSpec:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise fault(name, "it lists a block without a name")
    try:
        length, page_size = (_number(value, key, name) for key in ("length", "page_size"))
        return BlockSpec(value["name"], length, page_size)
    except UsageError as error:
        raise fault(name, str(error)) from error


def _number(
    value: dict[str, Any], key: str, name: str, most: int = OFFSET_MAX, *, negative: bool = False
) -> int:
    number = value.get(key)
    if type(number) is not int or not (-most if negative else 0) <= number <= most:
        raise fault(name, f"{key} is not a number up to {most}")
    return number
