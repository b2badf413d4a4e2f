"""The header of an increment: a mapped-ram stream of the pages that changed since a base snapshot.

An increment is not a snapshot by itself, and no QEMU may load it by mistake: it starts with its own
magic, and the stream follows at a later offset. All numbers of the header are little-endian::

    0   magic: "QMDELTA1", 8 bytes; written last of all, zeros before
    8   u32 version, 1
    12  u32 length of the JSON, bytes
    16  u64 where the stream starts: a multiple of 1 MiB
    24  digest, 16 bytes: xxh3-128 of bytes 8 to 23 and the JSON
    40  the JSON, then zeros up to the stream

The stream is that of a mapped-ram file, its offsets absolute in this file. In its bitmaps a set bit
means that the page changed and is here (one that became zero may be a hole), and a clear bit that the
page is as in the base. The JSON is an object of these keys; readers step over others::

    base            object:
        path        of the base: its name alone if it is beside the increment, else absolute
        size        of the base, bytes
        mtime_ns    when the base was last modified: nanoseconds since 1970
        seal        32 hexadecimal digits, the digest of the base's seal; null if it has none
    blocks          list of objects of name, length (bytes) and page_size: the RAM blocks, as the
                    base has them, in the order of the stream
    created_ns      when the guest stopped for this increment: nanoseconds since 1970
    machine         the machine type, as the stream's configuration names it
    changed_bytes   the bytes of all pages with a set bit
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyqmigrate.errors import SnapshotError, SnapshotTruncated, UsageError
from pyqmigrate.format.cursor import ByteSource
from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm, digest_of_all
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import BLOCKS_MAX, OFFSET_MAX, PAGES_ALIGNMENT

__all__ = ["HEADER_MAX", "MAGIC", "IncrementHeader", "base_location", "base_path", "is_increment"]

MAGIC = b"QMDELTA1"
HEADER_MAX = 8 << 20  # bytes of JSON; 65536 blocks need less
_VERSION = 1
_FIXED = struct.Struct("<IIQ")  # version, length of the JSON, where the stream starts
_DIGESTED_AT = len(MAGIC)
_DIGEST_AT = _DIGESTED_AT + _FIXED.size
_JSON_AT = _DIGEST_AT + DIGEST_SIZE
_PATH_MAX = 4096  # bytes, on Linux
_MACHINE_MAX = _NAME_MAX = 255


def is_increment(data: bytes) -> bool:
    """Whether a file that starts with ``data`` (8 bytes of it) is an increment."""
    return data.startswith(MAGIC)


@dataclass(frozen=True)
class IncrementHeader:
    """The header of an increment.

    ``base_path`` is as :func:`base_path` gives it; ``blocks`` are the base's RAM blocks, without
    addresses; ``created_ns`` is in nanoseconds since 1970, ``stream_offset`` in bytes. Raises
    UsageError for what cannot be written.
    """

    base_path: str
    base: SnapshotId
    blocks: tuple[BlockSpec, ...]
    created_ns: int
    machine: str
    changed_bytes: int = 0
    stream_offset: int = PAGES_ALIGNMENT

    def __post_init__(self) -> None:
        try:
            text = self._text()
            _check_layout(len(text), self.stream_offset)
            _read_value(json.loads(text))
        except SnapshotError as error:
            raise UsageError(f"an increment cannot have this header: {error}") from error

    def _text(self) -> bytes:
        base = self.base
        value = {
            "base": {
                "path": self.base_path,
                "size": base.size,
                "mtime_ns": base.mtime_ns,
                "seal": None if base.seal is None else base.seal.hex(),
            },
            "blocks": [
                {"name": block.name, "length": block.length, "page_size": block.page_size}
                for block in self.blocks
            ],
            "created_ns": self.created_ns,
            "machine": self.machine,
            "changed_bytes": self.changed_bytes,
        }
        return json.dumps(value).encode("ascii")

    def encode(self, *, magic: bool) -> bytes:
        """Return the header without the zeros after it. Without ``magic`` its first 8 bytes are
        zeros: the file is not an increment until :data:`MAGIC` is written there."""
        text = self._text()
        fixed = _FIXED.pack(_VERSION, len(text), self.stream_offset)
        start = MAGIC if magic else bytes(len(MAGIC))
        return start + fixed + _digest(fixed, text) + text

    @classmethod
    def read(cls, source: ByteSource) -> IncrementHeader:
        """Read the header at the start of a file.

        Raises SnapshotError for an invalid header, naming the field and its offset;
        SnapshotTruncated where the file ends before the stream starts.
        """
        head = source.read_at(0, _JSON_AT)
        if not is_increment(head):
            raise _fault("not an increment, or an unfinished one", "magic", 0)
        if len(head) < _JSON_AT:
            raise SnapshotTruncated("the file ends inside the header", offset=len(head))
        version, length, offset = _FIXED.unpack_from(head, _DIGESTED_AT)
        if version != _VERSION:
            raise _fault(
                f"version {version} of increments is not supported, only {_VERSION}",
                "version",
                _DIGESTED_AT,
            )
        _check_layout(length, offset)
        text = source.read_at(_JSON_AT, length)
        if len(text) < length or source.size < offset:
            raise SnapshotTruncated(
                f"the file ends before its stream, which starts at {offset:#x}", offset=source.size
            )
        fixed = head[_DIGESTED_AT:_DIGEST_AT]
        if _digest(fixed, text) != head[_DIGEST_AT:_JSON_AT]:
            raise _fault("the header is damaged: its digest does not match", "digest")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _fault("the header is not JSON", "json", _JSON_AT) from error
        fields = _read_value(value)
        try:
            return cls(**fields, stream_offset=offset)
        except UsageError as error:  # it would be longer as it is written here
            raise _fault("the header is too long for where the stream starts", "json") from error


def base_path(base: str, increment: str) -> str:
    """Return how the header of ``increment`` names ``base``, both paths: by its name alone where they
    are in one directory, so that the two can be moved together; by its absolute path elsewhere.

    Opens nothing: a symbolic link is named itself.
    """
    place = Path(base).absolute()
    return place.name if place.parent == Path(increment).absolute().parent else str(place)


def base_location(path: str, increment: str) -> Path:
    """Return where the base is that the header of ``increment`` names ``path``."""
    return Path(increment).absolute().parent / path


def _check_layout(length: int, offset: int) -> None:
    if not 2 <= length <= HEADER_MAX:
        raise _fault(f"invalid header length {length}: at most {HEADER_MAX}", "length", 12)
    if offset % PAGES_ALIGNMENT or not _JSON_AT + length <= offset <= OFFSET_MAX:
        raise _fault(
            f"the stream cannot start at {offset:#x}: that is not a multiple of 1 MiB after the "
            "header",
            "stream offset",
            16,
        )


def _digest(fixed: bytes, text: bytes) -> bytes:
    return digest_of_all(Algorithm.XXH3_128, [fixed, text])


def _fault(message: str, name: str, offset: int = _JSON_AT) -> SnapshotError:
    return SnapshotError(message, field=name, offset=offset)


def _read_value(value: Any) -> dict[str, Any]:
    """Return the fields that the JSON describes, each of them checked."""
    if not isinstance(value, dict):
        raise _fault("the header is not a JSON object", "json")
    base = value.get("base")
    if not isinstance(base, dict):
        raise _fault("the header has no base", "base")
    listed = value.get("blocks")
    if not isinstance(listed, list) or len(listed) > BLOCKS_MAX:
        raise _fault(f"the header has no list of at most {BLOCKS_MAX} blocks", "blocks")
    blocks = tuple(_read_block(number, block) for number, block in enumerate(listed))
    if len({block.name for block in blocks}) != len(blocks):
        raise _fault("two blocks have one name", "blocks")
    changed = _number(value, "changed_bytes", "changed_bytes")
    if changed > sum(block.length for block in blocks):
        raise _fault("more bytes changed than all blocks have", "changed_bytes")
    return {
        "base_path": _read_path(base),
        "base": _read_base(base),
        "blocks": blocks,
        "created_ns": _number(value, "created_ns", "created_ns", negative=True),
        "machine": _string(value, "machine", "machine", _MACHINE_MAX, empty=True),
        "changed_bytes": changed,
    }


def _read_path(base: dict[str, Any]) -> str:
    path = _string(base, "path", "base.path", _PATH_MAX)
    if "\0" in path:
        raise _fault("the path of the base has a zero byte", "base.path")
    return path


def _read_base(base: dict[str, Any]) -> SnapshotId:
    seal = base.get("seal")
    if seal is not None:
        try:
            seal = bytes.fromhex(seal)
        except (ValueError, TypeError) as error:
            raise _fault("the seal of the base is not a digest", "base.seal") from error
        if len(seal) != DIGEST_SIZE:
            raise _fault(f"the seal of the base has {len(seal)} bytes", "base.seal")
    return SnapshotId(
        _number(base, "size", "base.size"),
        _number(base, "mtime_ns", "base.mtime_ns", negative=True),
        seal,
    )


def _read_block(number: int, value: Any) -> BlockSpec:
    where = f"blocks[{number}]"
    if not isinstance(value, dict):
        raise _fault("a block is not a JSON object", where)
    name = _string(value, "name", f"{where}.name", _NAME_MAX)
    length = _number(value, "length", f"{where}.length")
    page_size = _number(value, "page_size", f"{where}.page_size")
    try:
        return BlockSpec(name, length, page_size)
    except UsageError as error:
        raise _fault(str(error), where) from error


def _number(value: dict[str, Any], key: str, where: str, *, negative: bool = False) -> int:
    number = value.get(key)
    if isinstance(number, bool) or not isinstance(number, int):
        raise _fault(f"{key} is not a whole number", where)
    if not (-OFFSET_MAX if negative else 0) <= number <= OFFSET_MAX:
        raise _fault(f"{key} is out of its range", where)
    return number


def _string(value: dict[str, Any], key: str, where: str, most: int, *, empty: bool = False) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise _fault(f"{key} is not a string", where)
    try:
        length = len(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError as error:
        raise _fault(f"{key} cannot be a name of bytes", where) from error
    if not (0 if empty else 1) <= length <= most:
        raise _fault(f"{key} has {length} bytes; {most} are possible", where)
    return text
