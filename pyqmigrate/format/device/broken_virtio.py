"""Removing the marks of broken virtio devices, which a QEMU without guest memory writes.

A virtio device reads its queues from guest memory when it is loaded. If that is empty, they
contradict the device's own counters, and QEMU marks the device as broken: it then writes the
subsection ``virtio/broken``, which the description counts in the field of type ``virtio``.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from typing import Any

from pyqmigrate.format.stream.description import body_lengths, parse
from pyqmigrate.format.stream.device_only import SectionBuffer, read_device_sections

__all__ = ["without_broken"]

_NAME = b"virtio/broken"
# A subsection: its type, its name, its version, and a byte that is true.
_MARK = b"\x05" + bytes([len(_NAME)]) + _NAME + b"\0\0\0\1" + b"\1"


def without_broken(ours: bytes, theirs: bytes, description: bytes) -> tuple[bytes, bytes]:
    """Return ``theirs`` and its description without the marks that ``ours`` does not have.

    ours, theirs: FULL sections, one after another, with their footers. Other differences are kept.
    Raises SnapshotError for bytes that are not sections.
    """
    lengths = body_lengths(parse(description))
    described: dict[str, Any] = json.loads(description)
    first, second = SectionBuffer(ours), SectionBuffer(theirs)
    kept, end = bytearray(), 0
    for mine, other in zip_longest(
        read_device_sections(first, lengths), read_device_sections(second, lengths)
    ):
        if mine is None or other is None or mine.name != other.name:
            break
        place = second.body_of(other)
        body = theirs[place]
        if mine.body_length + len(_MARK) != len(body) or body.count(_MARK) != 1:
            continue
        fields = _virtio_fields(described, other.name, other.instance_id)
        if len(fields) != 1:
            continue
        fields[0]["size"] -= len(_MARK)
        kept += theirs[end : place.start] + body.replace(_MARK, b"")
        end = place.stop
    if not end:
        return theirs, description
    return bytes(kept + theirs[end:]), json.dumps(described).encode()


def _virtio_fields(description: dict[str, Any], name: str, instance: int) -> list[dict[str, Any]]:
    return [
        field
        for device in description["devices"]
        if (device.get("name"), device.get("instance_id")) == (name, instance)
        for field in device.get("fields", ())
        if field.get("type") == "virtio" and isinstance(field.get("size"), int)
    ]
