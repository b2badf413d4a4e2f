"""The plain twin of the device decoder: from a tree back to the bytes."""

from __future__ import annotations

import struct

from pyqmigrate.format.device.values import Device, Field, Scalar, State

__all__ = ["encode", "fields_of"]

_LISTS = {"qtailq", "qlist", "gtree"}


def encode(state: State) -> bytes:
    """The bytes that ``state`` was decoded from, its frame as a subsection excluded."""
    parts = [_field(field) for field in state.fields]
    for sub in state.subsections:
        name = sub.name.encode("utf-8", "surrogatepass")
        assert sub.version is not None
        parts += [bytes([5, len(name)]), name, struct.pack(">I", sub.version), encode(sub)]
    return b"".join(parts)


def fields_of(device: Device) -> list[Field]:
    """All fields of the tree."""
    return [field for state in device.states() for field in state.fields]


def _field(field: Field) -> bytes:
    value = field.value
    if isinstance(value, State):
        return encode(value)
    if field.type in _LISTS and isinstance(value, tuple) and field.length:
        count = struct.pack(">I", len(value)) if field.type == "gtree" else b""
        elements = [b"\1" + encode(state) for state in value if isinstance(state, State)]
        return count + b"".join(elements) + b"\0"
    if isinstance(value, tuple):
        width = field.length // max(1, len(value))
        return b"".join(
            encode(item) if isinstance(item, State) else _scalar(item, width, field)
            for item in value
        )
    return _scalar(value, field.length, field)


def _scalar(value: Scalar, width: int, field: Field) -> bytes:
    if value is None:
        return b"0"
    if isinstance(value, int):
        return value.to_bytes(width, "big", signed=value < 0)
    if field.type == "bitmap" and not field.opaque:
        return b"".join(value[at : at + 8][::-1] for at in range(0, len(value), 8))
    return value
