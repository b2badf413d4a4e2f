"""What a QEMU without guest memory writes more of a virtio device than the guest's own.

A virtio device that is loaded looks at its queues in guest memory. Where that is empty they
contradict the device's own counters, and QEMU marks the device as broken: it is written with the
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
# A subsection: its kind, its name, its version, and one byte that says yes.
_MARK = b"\x05" + bytes([len(_NAME)]) + _NAME + b"\0\0\0\1" + b"\1"


def without_broken(ours: bytes, theirs: bytes, description: bytes) -> tuple[bytes, bytes]:
    """The sections ``theirs`` and their description without the marks that ``ours`` do not have.

    ours, theirs: FULL sections, one after another, with their footers. What differs in another way
    stays as it is. Raises SnapshotError for bytes that are not sections.
    """
    lengths = body_lengths(parse(description))
    described: dict[str, Any] = json.loads(description)
    first, second = SectionBuffer(ours), SectionBuffer(theirs)
    kept, at = bytearray(), 0
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
        kept += theirs[at : place.start] + body.replace(_MARK, b"")
        at = place.stop
    if not at:
        return theirs, description
    return bytes(kept + theirs[at:]), json.dumps(described).encode()


def _virtio_fields(description: dict[str, Any], name: str, instance: int) -> list[dict[str, Any]]:
    return [
        field
        for device in description["devices"]
        if (device.get("name"), device.get("instance_id")) == (name, instance)
        for field in device.get("fields", ())
        if field.get("type") == "virtio" and isinstance(field.get("size"), int)
    ]
