"""The JSON description at the end of a stream, and the body lengths that it tells.

The element is ``0x06, u32 length, JSON``, after the end-of-stream byte
(docs/internals/format.md, "Description")::

    {"configuration": {...}, "page_size": 4096,
     "devices": [{"name": ..., "instance_id": ..., "fields": [...], "subsections": [...]}, ...]}

Device sections carry no length of their own. The description gives one for each, in terms of
the sizes of its fields; it can be wrong for arrays whose elements differ in size, so that a
reader has to look for the footer before it believes a length.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.format.cursor import ByteSource, Cursor
from pyqmigrate.format.stream.configuration import Configuration, described

__all__ = [
    "DESCRIPTION_MAX",
    "HEADER_LENGTH",
    "Description",
    "body_lengths",
    "describes_devices",
    "encode",
    "locate",
    "no_devices",
    "parse",
    "read",
    "with_configuration",
]

DESCRIPTION_MAX = 64 << 20  # bytes; real ones have 0.1 to some MiB
_WIDE_MAX = 8 << 20  # bytes of one that is not plain ASCII: Python takes four a character then
_VALUES_MAX = 1 << 20  # JSON values in one description: bounds the memory of the parsed form
_LENGTH_MAX = (1 << 63) - 1

TYPE_DESCRIPTION = 0x06
_FRAME = struct.Struct(">BI")  # type, length of the JSON
HEADER_LENGTH = _FRAME.size  # bytes of the element before the JSON
_CHUNK = 1 << 20
_CONFIGURATION = "configuration"


@dataclass(frozen=True)
class Description:
    """A description found in a file.

    ``offset`` is the absolute file offset of its type byte, ``end`` that just after its JSON,
    ``value`` the parsed JSON object. Of a key that is repeated in an object, the last one holds.
    """

    offset: int
    end: int
    value: dict[str, Any]


def encode(text: bytes) -> bytes:
    """The element for the JSON ``text``. Raises :class:`UsageError` when that is too long."""
    if len(text) > DESCRIPTION_MAX:
        raise UsageError(f"a description of {len(text)} bytes; at most {DESCRIPTION_MAX} are read")
    return _FRAME.pack(TYPE_DESCRIPTION, len(text)) + text


def no_devices(page_size: int) -> bytes:
    """JSON for a stream without device sections, whose pages have ``page_size`` bytes."""
    return json.dumps({"page_size": page_size, "devices": []}).encode()


def with_configuration(text: bytes, settings: Configuration) -> bytes:
    """Return ``text`` with the description of this configuration instead of its own.

    Every reader of the stream finds the configuration by it (QEMU's analyze-migration.py), and a
    description that was written for another stream may describe other capabilities. All else stays
    as it is, byte for byte. Text that is not a JSON object is returned as it is.
    """
    ours = json.dumps(described(settings)).encode()
    source = text.decode("latin-1")  # a character a byte
    start = source.find("{")
    if start < 0 or source[:start].strip():
        return text
    try:
        for key, first, end in _members(source, start + 1):
            if key == _CONFIGURATION:
                return text[:first] + ours + text[end:]
    except (ValueError, IndexError, RecursionError):
        return text
    rest = text[start + 1 :]
    comma = b"" if rest.lstrip().startswith(b"}") else b", "
    return text[: start + 1] + b'"configuration": ' + ours + comma + rest


def _members(source: str, at: int) -> Iterator[tuple[str, int, int]]:
    """Each member of the JSON object whose ``{`` is before ``at``: its key, and where its value
    starts and ends."""
    decode = json.JSONDecoder().raw_decode
    while source[at := _after_space(source, at)] != "}":
        key, at = decode(source, _after_space(source, at + (source[at] == ",")))
        first = _after_space(source, _after_space(source, at) + 1)
        _, at = decode(source, first)
        yield key, first, at


def _after_space(source: str, at: int) -> int:
    while source[at] in " \t\n\r":
        at += 1
    return at


def read(cursor: Cursor) -> Description | None:
    """Read the description that the cursor may stand at, forward.

    None when another byte than its type is next, or none: QEMU can leave it out, and ignores
    what follows the stream. Raises :class:`SnapshotError` when it is cut short, too long, or not
    JSON.
    """
    offset = cursor.position
    if cursor.peek(1) != bytes([TYPE_DESCRIPTION]):
        return None
    _, length = _FRAME.unpack(cursor.take(_FRAME.size, "the description"))
    if length > DESCRIPTION_MAX:
        raise SnapshotError(f"the description claims {length} bytes", offset=offset, field="length")
    text = cursor.take(length, "the description")
    return Description(offset, cursor.position, _parse(text, offset))


def locate(source: ByteSource) -> Description | None:
    """Find the description from the end of the file, without walking the stream.

    None when the file does not end with one. Zero bytes after it, up to 1 MiB, are tolerated.
    Raises :class:`SnapshotError` when one is there but not JSON.
    """
    size = source.size
    base = max(0, size - _CHUNK)
    tail = source.read_at(base, size - base).rstrip(b"\0")
    end = base + len(tail)
    if not tail.endswith(b"}"):
        return None
    while (zero := tail.rfind(b"\0")) < 0:
        if base == 0 or end - base > DESCRIPTION_MAX:
            return None
        step = min(base, _CHUNK)
        base -= step
        tail = source.read_at(base, step)  # not kept: there may be much of it
    # JSON has no zero byte, and the end-of-stream byte before the frame is one: so the last
    # zero is that byte, or one of the four of the length.
    first = base + zero + 1
    text = memoryview(source.read_at(first, end - first))
    for start in range(first, min(first + 1 + _FRAME.size, end)):
        offset = start - _FRAME.size
        frame = b"\0" + _FRAME.pack(TYPE_DESCRIPTION, end - start)
        if offset > 0 and source.read_at(offset - 1, len(frame)) == frame:
            return Description(offset, end, _parse(text[start - first :], offset))
    return None


def body_lengths(value: Mapping[str, Any]) -> dict[tuple[str, int], int]:
    """Length in bytes of each device's body, by name and instance id.

    Devices whose entry makes no sense are left out.
    """
    devices = value.get("devices")
    lengths: dict[tuple[str, int], int] = {}
    for device in devices if isinstance(devices, list) else []:
        if not isinstance(device, dict):
            continue
        name, instance = device.get("name"), device.get("instance_id")
        length = _body_length(device)
        if isinstance(name, str) and isinstance(instance, int) and length is not None:
            lengths[name, instance] = length
    return lengths


def describes_devices(value: Mapping[str, Any] | None) -> bool:
    """Return whether a description says more of any device than how long its body is.

    QEMU names the structure of every device that has one (``vmsd_name``); a description that was
    made from lengths alone does not. True where there are no devices to describe.
    """
    devices = (value or {}).get("devices")
    if value is None or not isinstance(devices, list):
        return False
    return not devices or any(isinstance(d, dict) and "vmsd_name" in d for d in devices)


def _body_length(device: dict[str, Any]) -> int | None:
    """Add up the top-level fields and the subsections with their frames.

    See docs/internals/format.md, "Length of a body".
    """
    total = 0
    pending = [device]
    while pending:
        state = pending.pop()
        fields, subsections = state.get("fields", []), state.get("subsections", [])
        if not isinstance(fields, list) or not isinstance(subsections, list):
            return None
        for field in fields:
            if not isinstance(field, dict):
                return None
            size, count = field.get("size"), field.get("array_len", 1)
            if not _is_length(size) or not _is_length(count):
                return None
            total += size * count
        for subsection in subsections:
            name = subsection.get("vmsd_name") if isinstance(subsection, dict) else None
            if not isinstance(name, str):
                return None
            total += 1 + 1 + len(name.encode("utf-8", "replace")) + 4
            pending.append(subsection)
    return total if total <= _LENGTH_MAX else None


def _is_length(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LENGTH_MAX


def parse(text: bytes) -> dict[str, Any]:
    """Return the value of a description's text. Raises SnapshotError for any other text."""
    return _parse(text, 0)


def _parse(data: bytes | memoryview, offset: int) -> dict[str, Any]:
    text = str(data, "latin-1")
    if not text.isascii() or "\\" in text:
        if len(data) > _WIDE_MAX:
            raise SnapshotError(
                f"the description has {len(data)} bytes and is not plain ASCII, of which at most"
                f" {_WIDE_MAX} are read",
                offset=offset,
            )
        text = str(data, "utf-8", "surrogateescape")
    if text.count(",") + text.count("[") + text.count("{") > _VALUES_MAX:
        raise SnapshotError(f"the description has over {_VALUES_MAX} values", offset=offset)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"the description is not JSON: {error}", offset=offset) from error
    if not isinstance(value, dict):
        raise SnapshotError("the description is not a JSON object", offset=offset)
    return value
