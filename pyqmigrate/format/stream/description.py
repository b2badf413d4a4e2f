"""The JSON description at the end of a stream, and the body lengths that it gives.

The element is ``0x06, u32 length, JSON``, after the end-of-stream byte
(docs/internals/format.md, "Description")::

    {"configuration": {...}, "page_size": 4096,
     "devices": [{"name": ..., "instance_id": ..., "fields": [...], "subsections": [...]}, ...]}

Device sections have no length of their own. The sizes of the fields in the description give one
for each. It can be wrong for arrays whose elements differ in size, so a reader has to check for the
footer before it trusts a length.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

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
    "no_devices",
    "parse",
    "read",
    "read_from_end",
    "with_configuration",
]

DESCRIPTION_MAX = 64 << 20  # bytes; real ones have 0.1 to some MiB
_WIDE_MAX = 8 << 20  # bytes of a description that is not ASCII: Python may use 4 per character
_VALUES_MAX = 1 << 20  # JSON values in one description: bounds the memory of the parsed value
_LENGTH_MAX = (1 << 63) - 1

TYPE_DESCRIPTION = 0x06
_FRAME = struct.Struct(">BI")  # type, length of the JSON
HEADER_LENGTH = _FRAME.size  # bytes of the element before the JSON
_CHUNK = 1 << 20
_CONFIGURATION = "configuration"


class Description(NamedTuple):
    """A description found in a file.

    ``offset`` is the absolute file offset of its type byte, ``end`` that just after its JSON,
    ``value`` the parsed JSON object. If an object repeats a key, the last one counts.
    """

    offset: int
    end: int
    value: dict[str, Any]


def encode(text: bytes) -> bytes:
    """Return the element for the JSON ``text``. Raises :class:`UsageError` if it is too long."""
    if len(text) > DESCRIPTION_MAX:
        raise UsageError(f"a description of {len(text)} bytes; at most {DESCRIPTION_MAX} are read")
    return _FRAME.pack(TYPE_DESCRIPTION, len(text)) + text


def no_devices(page_size: int) -> bytes:
    """Return the JSON for a stream without devices; ``page_size`` is in bytes."""
    return json.dumps({"page_size": page_size, "devices": []}).encode()


def with_configuration(text: bytes, settings: Configuration) -> bytes:
    """Return ``text`` with the description of this configuration in place of its own.

    Readers such as QEMU's analyze-migration.py decode the configuration by it, and a description
    that was written for another stream may describe other capabilities. The rest is kept byte for
    byte. Text that is not a JSON object is returned unchanged.
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


def _members(source: str, index: int) -> Iterator[tuple[str, int, int]]:
    """Yield the members of the JSON object whose ``{`` is before ``index``: the key, and the start
    and end of the value."""
    decode = json.JSONDecoder().raw_decode
    while source[index := _after_space(source, index)] != "}":
        key, index = decode(source, _after_space(source, index + (source[index] == ",")))
        start = _after_space(source, _after_space(source, index) + 1)
        _, index = decode(source, start)
        yield key, start, index


def _after_space(source: str, index: int) -> int:
    while source[index] in " \t\n\r":
        index += 1
    return index


def read(cursor: Cursor) -> Description | None:
    """Read the description at the cursor.

    Return None if there is none: QEMU can leave it out, and ignores all bytes after the stream.
    Raises :class:`SnapshotError` if it is cut short, too long, or not JSON.
    """
    offset = cursor.position
    if cursor.peek(1) != bytes([TYPE_DESCRIPTION]):
        return None
    _, length = _FRAME.unpack(cursor.take(_FRAME.size, "the description"))
    if length > DESCRIPTION_MAX:
        raise SnapshotError(f"the description claims {length} bytes", offset=offset, field="length")
    text = cursor.take(length, "the description")
    return Description(offset, cursor.position, _parse(text, offset))


def read_from_end(source: ByteSource) -> Description | None:
    """Find the description from the end of the file and read it, without reading the stream.

    Return None if the file does not end with one. Up to 1 MiB of zero bytes after it are tolerated.
    Raises :class:`SnapshotError` if the description is not JSON.
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
        tail = source.read_at(base, step)  # not kept: it may be long
    # JSON has no zero byte, and the end-of-stream byte before the frame is one. So the last zero
    # is that byte, or one of the four bytes of the length.
    first = base + zero + 1
    text = memoryview(source.read_at(first, end - first))
    for start in range(first, min(first + 1 + _FRAME.size, end)):
        offset = start - _FRAME.size
        frame = b"\0" + _FRAME.pack(TYPE_DESCRIPTION, end - start)
        if offset > 0 and source.read_at(offset - 1, len(frame)) == frame:
            return Description(offset, end, _parse(text[start - first :], offset))
    return None


def body_lengths(value: Mapping[str, Any]) -> dict[tuple[str, int], int]:
    """Return the length in bytes of each device's body, by name and instance id.

    Devices with an invalid entry are left out.
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
    """Return whether a description has more than the lengths of devices' bodies.

    QEMU names the structure of every device that has one (``vmsd_name``); a description made from
    lengths alone does not. True if there are no devices.
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
