"""What a compact file has besides the plain file: its time of change, and the files beside it.

A compact file is a plain file in Zstandard's seekable form (:mod:`pyqmigrate.format.seekable`). Its last
frame before the seek table is one that decompressors step over, number :data:`FRAME`, of one line of
JSON, ended by a newline and at most 64 KiB long; then the content of the files, one after another. The
line is an object of these keys, in this order; readers step over others between the first and the
last::

    format      "pyqmigrate-compact"
    version     1
    size        of the plain file, bytes
    mtime_ns    when it was last modified: nanoseconds since 1970
    files       list of objects of suffix (.seal, .vm.json or .workingset) and length (bytes)
    digest      32 hexadecimal digits: xxh3-128 of the content of the files, followed by the line up
                to the comma before this key
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.digest import Algorithm, digest_of_all
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX

__all__ = ["FRAME", "FRAME_SIZE_MAX", "RECORD", "SEAL", "SUFFIXES", "WORKING_SET", "CompactHead"]

FRAME = 13  # 0x184D2A5D
SEAL, RECORD, WORKING_SET = SUFFIXES = (".seal", ".vm.json", ".workingset")
FRAME_SIZE_MAX = 512 << 20  # bytes; a guest of 16 TiB has a seal of 256 MiB
_LINE_MAX = 64 << 10
_FORMAT = "pyqmigrate-compact"
_VERSION = 1
_START = b'{"format": "' + _FORMAT.encode() + b'"'


@dataclass(frozen=True)
class CompactHead:
    """``size`` in bytes; ``files`` are the contents by suffix."""

    size: int
    mtime_ns: int
    files: Mapping[str, bytes]

    def encode(self) -> bytes:
        """Return the content of the frame."""
        value = {
            "format": _FORMAT,
            "version": _VERSION,
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "files": [
                {"suffix": suffix, "length": len(content)} for suffix, content in self.files.items()
            ],
        }
        front = json.dumps(value).encode("ascii")[:-1]
        digest = digest_of_all(Algorithm.XXH3_128, [*self.files.values(), front])
        return front + _end(digest) + b"".join(self.files.values())

    @classmethod
    def decode(cls, content: bytes) -> CompactHead | None:
        """Decode the content of a frame; None if it is something else.

        Raises SnapshotError if it is damaged.
        """
        if not content.startswith(_START):
            return None
        line, newline, _ = content[:_LINE_MAX].partition(b"\n")
        if not newline:
            raise _fault("its line does not end")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _fault("its line is not JSON") from error
        if _number(value, "version") != _VERSION:
            raise _fault(f"version {value['version']} is not known here, only {_VERSION}")
        files: dict[str, bytes] = {}
        offset = len(line) + 1
        for suffix, length in _listed(value):
            files[suffix] = content[offset : offset + length]
            offset += length
        if offset != len(content):
            raise _fault(f"it has {len(content)} bytes, and {offset} are listed")
        front = line[: -len(_end(bytes(16)).rstrip(b"\n"))]
        digest = digest_of_all(Algorithm.XXH3_128, [*files.values(), front])
        if not (line + newline).endswith(_end(digest)):
            raise _fault("its digest does not match")
        return cls(_number(value, "size"), _number(value, "mtime_ns", negative=True), files)


def _end(digest: bytes) -> bytes:
    return b', "digest": "' + digest.hex().encode("ascii") + b'"}\n'


def _listed(value: dict[str, Any]) -> list[tuple[str, int]]:
    listed = value.get("files")
    if not isinstance(listed, list) or len(listed) > len(SUFFIXES):
        raise _fault("it has no list of files")
    found = []
    for entry in listed:
        if not isinstance(entry, dict) or entry.get("suffix") not in SUFFIXES:
            raise _fault("it lists a file of an unknown kind")
        found.append((str(entry["suffix"]), _number(entry, "length")))
    if len(dict(found)) != len(found):
        raise _fault("it lists a file twice")
    return found


def _number(value: dict[str, Any], key: str, *, negative: bool = False) -> int:
    number = value.get(key)
    if isinstance(number, bool) or not isinstance(number, int):
        raise _fault(f"{key} is not a whole number")
    if not (-OFFSET_MAX if negative else 0) <= number <= OFFSET_MAX:
        raise _fault(f"{key} is out of its range")
    return number


def _fault(message: str) -> SnapshotError:
    return SnapshotError(
        f"the part of a compact file with the files beside the snapshot is damaged: {message}",
        field="companions",
    )
