"""Whether a description that was written for other bytes is true of these.

Two QEMUs of one machine write the same device sections. The description that one of them wrote
holds for the bytes of the other when they have the same sections in the same order, each as long
and of the same version, and when it explains both bodies of each section or neither (it cannot
explain some: :mod:`~pyqmigrate.format.device_state`). A subsection that only one of them has shows
in the length, and in its name, which is part of the body.

A virtio device is one field of type ``virtio``, of which a description says the length and no more.
Loaded without guest memory, it finds its queues inconsistent and writes a subsection of that
(``virtio/broken``): :func:`fitted` gives the field the length that it has in the original's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from itertools import zip_longest
from typing import Any

from pyqmigrate.errors import NotSupported
from pyqmigrate.format.description import body_lengths, parse
from pyqmigrate.format.device_state import Budget, decode_device, described_devices
from pyqmigrate.format.device_walk import HEADER, HEADER_LENGTH, walk_devices
from pyqmigrate.format.elements import Section

__all__ = ["check_described", "fitted", "with_zeros"]

_VIRTIO = "virtio"


def check_described(ours: bytes, theirs: bytes, description: Mapping[str, Any]) -> None:
    """Return when the ``description`` of sections ``theirs`` is true of ``ours``.

    ours, theirs: FULL sections, one after another, with their footers.

    Raises NotSupported that names the section where it is not, SnapshotError for bytes that are
    not sections.
    """
    lengths = body_lengths(description)
    devices = described_devices(description)
    first, second = _Sections(ours), _Sections(theirs)
    for mine, other in zip_longest(
        walk_devices(first, lengths), walk_devices(second, lengths)
    ):
        described = devices.get((mine.name, mine.instance_id)) if mine is not None else None
        whole = described is not None and _is_one_virtio_field(described)
        if mine is None or other is None or _identity(mine) != _identity(other) or (
            mine.body_length != other.body_length and not whole
        ):
            raise NotSupported(f"it has {_shown(other)} where the snapshot has {_shown(mine)}")
        if described is None:
            raise NotSupported(f"it does not describe {_shown(mine)}")
        if whole and lengths.get((mine.name, mine.instance_id)) == mine.body_length:
            continue
        if _explained(mine, first, described) != _explained(other, second, described):
            raise NotSupported(f"its description does not fit {_shown(mine)}")


def fitted(ours: bytes, description: bytes) -> bytes:
    """The text of a ``description`` whose virtio devices are as long as in the FULL sections
    ``ours``. Raises SnapshotError for what is no description, or no sections."""
    value = parse(description)
    lengths = {
        (section.name, section.instance_id): section.body_length
        for section in walk_devices(_Sections(ours), body_lengths(value))
    }
    changed = False
    for key, described in described_devices(value).items():
        if key in lengths and _is_one_virtio_field(described):
            field = described["fields"][0]
            changed |= field["size"] != lengths[key]
            field["size"] = lengths[key]
    if not changed:
        return description
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")


def _is_one_virtio_field(described: Mapping[str, Any]) -> bool:
    fields = described.get("fields")
    if not isinstance(fields, list) or len(fields) != 1 or described.get("subsections"):
        return False
    field = fields[0]
    return isinstance(field, dict) and field.get("type") == _VIRTIO and "size" in field


def with_zeros(sections: bytes, names: Collection[str]) -> bytes:
    """FULL ``sections``, one after another, those of these ``names`` with nothing but zeros in
    their bodies. Raises SnapshotError for bytes that are not sections."""
    data = bytearray(sections)
    for section in walk_devices(_Sections(sections)):
        if section.name in names:
            first = section.body_offset - HEADER_LENGTH
            data[first : first + section.body_length] = bytes(section.body_length)
    return bytes(data)


class _Sections:
    """Sections in memory, as a file of devices alone."""

    def __init__(self, sections: bytes) -> None:
        self._data = HEADER + sections + b"\0"

    @property
    def size(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


def _identity(section: Section) -> tuple[object, ...]:
    return section.section_id, section.name, section.instance_id, section.version_id


def _explained(section: Section, source: _Sections, described: Mapping[str, Any]) -> bool:
    body = source.read_at(section.body_offset, section.body_length)
    return decode_device(section, body, described, Budget()).explained


def _shown(section: Section | None) -> str:
    if section is None:
        return "no further section"
    return (
        f"section {section.section_id} {section.name!r} (instance {section.instance_id}, version "
        f"{section.version_id}) of {section.body_length} bytes"
    )
