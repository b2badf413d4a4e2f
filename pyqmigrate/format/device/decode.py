"""Decoding device sections with the description in their stream.

A body is the fields of the description one after another, without gaps; then its subsections
(docs/internals/format.md, "Description" and "Length of a body")::

    field        size bytes; array_len times if that is given
    struct       the fields of "struct", then its subsections; its size covers both
    qtailq       per element: 0x01, the element's fields; at the end 0x00       (qlist likewise)
    gtree        u32 count; per element: 0x01, key, value's fields; at the end 0x00
    subsection   0x05, str8 name, u32 version, fields

An array is described by its first element. If elements differ in size, that is wrong, and so are the
lengths of everything around it; bytes that such a description does not explain stay bytes. The
description is as untrusted as the rest of the file: depth is bounded, so is the number of values, in
a section and in a whole call, and no size exceeds that of its container.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.cursor import ByteSource
from pyqmigrate.format.device.values import Device, Field, State, Value
from pyqmigrate.format.device.vmstate_types import (
    GTREE,
    LISTS,
    VECTORS,
    decode_array,
    decode_one,
    width,
)
from pyqmigrate.format.stream.description import parse
from pyqmigrate.format.stream.wire import Section, SectionKind

__all__ = [
    "DECODED_STATE_MAX",
    "VALUES_MAX",
    "Budget",
    "DescribedStream",
    "decode_device",
    "decode_devices",
    "described_by",
    "described_devices",
]

DECODED_STATE_MAX = 96 << 20  # bytes of bodies in one call, which can be in memory twice
DEPTH_MAX = 32  # structs and subsections in one another; QEMU's own come to 8
# Fields in one call, repeated ones counted as often. A q35 with 64 CPUs and 224 virtio devices has
# 24 thousand of them.
VALUES_MAX = 1 << 18
_SECTION_COST = 8  # what a section counts beside its fields
_VALUES_FREE = 1024  # what any section may have; beyond that it needs a byte for every two
_ELEMENTS_A_VALUE = 8  # elements of an array of numbers that count as much as a field

_COMPOUND = LISTS | VECTORS.keys()
_SUBSECTION = 0x05
_VERSION = struct.Struct(">I")
_COUNT = struct.Struct(">I")
_MORE, _END = b"\x01", b"\x00"


class DescribedStream(Protocol):
    """The parts of a parsed stream, of either form, that decoding needs."""

    @property
    def sections(self) -> Sequence[Section]: ...

    @property
    def description(self) -> Mapping[str, Any] | None: ...


def decode_devices(
    source: ByteSource,
    stream: DescribedStream,
    *,
    name: str | None = None,
    section_id: int | None = None,
    longest: int | None = None,
) -> Iterator[Device]:
    """Decode the device sections of ``stream``, in order, one after another.

    ``name`` and ``section_id`` select sections, and ``longest`` omits bodies of more bytes; only the
    bodies of selected sections are read from ``source``. Bytes that the description does not explain
    are returned as bytes, and are not an error. Raises :class:`SnapshotError` if the file has become
    shorter, :class:`NotSupported` if the selected sections have more than DECODED_STATE_MAX bytes, or
    more than VALUES_MAX values.
    """
    sections = [
        section
        for section in stream.sections
        if section.kind is SectionKind.FULL
        and (name is None or section.name == name)
        and (section_id is None or section.section_id == section_id)
        and (longest is None or section.body_length <= longest)
    ]
    total = sum(section.body_length for section in sections)
    if total > DECODED_STATE_MAX:
        raise NotSupported(
            f"device state of {total >> 20} MiB; at most {DECODED_STATE_MAX >> 20} are decoded at "
            "once: choose among the devices, by name or section id"
        )
    described = described_devices(stream.description)
    budget = Budget()
    for section in sections:
        body = source.read_at(section.body_offset, section.body_length)
        if len(body) != section.body_length:
            raise SnapshotError(
                f"the file ends within section {section.name!r}: truncated",
                offset=section.body_offset + len(body),
            )
        budget.spend(_SECTION_COST)
        entry = described.get((section.name, section.instance_id))
        yield decode_device(section, body, entry, budget)


@dataclass(frozen=True)
class _StreamWithDescription:
    sections: Sequence[Section]
    description: Mapping[str, Any] | None


def described_by(stream: DescribedStream, text: bytes | None) -> DescribedStream:
    """Return ``stream`` with the description in JSON ``text``; with None, return it unchanged.

    Raises :class:`SnapshotError` for text that is not a description.
    """
    return stream if text is None else _StreamWithDescription(stream.sections, parse(text))


class Budget:
    """The number of values left for the sections that are decoded with it."""

    def __init__(self, values: int = VALUES_MAX) -> None:
        self._left = values

    def spend(self, values: int) -> None:
        """Take values from the budget. Raises NotSupported if too few are left."""
        self._left -= values
        if self._left < 0:
            raise NotSupported(
                f"device state of more than {VALUES_MAX} values; choose among the devices, by name "
                "or section id"
            )


def decode_device(
    section: Section, body: bytes, described: Mapping[str, Any] | None, budget: Budget | None = None
) -> Device:
    """Decode one section; ``described`` is its entry in the description's ``devices``.

    Raises NotSupported if ``budget`` (by default a new one) does not suffice.
    """
    decoder = _Decoder(body, budget or Budget())
    if described is None:
        state = State(section.name, None, 0, len(body), (decoder.rest(0, len(body)),))
    else:
        state = decoder.device(described)
    return Device(
        name=section.name,
        instance_id=section.instance_id,
        version_id=section.version_id,
        section_id=section.section_id or 0,
        offset=section.offset,
        length=section.length,
        body_offset=section.body_offset,
        body_length=section.body_length,
        state=state,
        described=described is not None,
        explained=decoder.explained,
    )


def described_devices(
    description: Mapping[str, Any] | None,
) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Return the entries of a description's ``devices``, by name and instance id."""
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    for device in _objects((description or {}).get("devices")):
        name, instance = device.get("name"), device.get("instance_id")
        if isinstance(name, str) and isinstance(instance, int):
            found[name, instance] = device
    return found


class _UnexplainedBytes(Exception):
    """The bytes do not match the description."""


class _Decoder:
    """The decoding of one body. ``explained`` is True as long as every byte fits."""

    def __init__(self, body: bytes, budget: Budget) -> None:
        self._body = body
        self._budget = budget
        self._values_left = _VALUES_FREE + 2 * len(body)
        self.explained = True

    def device(self, described: Mapping[str, Any]) -> State:
        """Return the state of the whole body."""
        if self._afford(_listed(described)):
            return self.bounded(described, 0, len(self._body), 0)
        return _state(described, 0, len(self._body), [self.rest(0, len(self._body))], ())

    def bounded(self, described: Mapping[str, Any], offset: int, end: int, depth: int) -> State:
        """Return the state in ``[offset, end)``, with a field of bytes for the part that is not explained."""
        items = _objects(described.get("fields"))
        fields: list[Field] = []
        subsections: list[State] = []
        try:
            position = self._fill(described, offset, end, depth, fields, subsections)
        except _UnexplainedBytes:
            position = -1
        if position != end:
            subsections = []
            trusted = next(
                (n for n, item in enumerate(items[: len(fields)]) if _is_doubtful(item)),
                len(fields),
            )
            del fields[trusted:]
            position = offset + sum(field.length for field in fields)
            if position < end:
                fields.append(self.rest(position, end))
            self.explained = False
        return _state(described, offset, end, fields, subsections)

    def rest(self, offset: int, end: int) -> Field:
        """Return a field for bytes that are not explained."""
        self.explained = False
        return Field("", "", offset, end - offset, self._body[offset:end], opaque=True)

    def _fill(
        self,
        described: Mapping[str, Any],
        offset: int,
        end: int,
        depth: int,
        fields: list[Field],
        subsections: list[State],
    ) -> int:
        """Decode fields and subsections from ``offset`` on into the lists; return their end."""
        for item in _objects(described.get("fields")):
            fields.append(self._field(item, offset, end, depth))
            offset += fields[-1].length
        for item in _objects(described.get("subsections")):
            subsections.append(self._subsection(item, offset, end, depth + 1))
            offset += subsections[-1].length
        return offset

    def _subsection(self, described: Mapping[str, Any], offset: int, end: int, depth: int) -> State:
        if depth > DEPTH_MAX or not self._afford(_listed(described)):
            raise _UnexplainedBytes
        frame = _frame(described)
        start = offset + len(frame)
        if start > end or self._body[offset:start] != frame:
            raise _UnexplainedBytes
        fields: list[Field] = []
        subsections: list[State] = []
        stop = self._fill(described, start, end, depth, fields, subsections)
        return _state(described, offset, stop, fields, subsections)

    def _field(self, item: Mapping[str, Any], offset: int, end: int, depth: int) -> Field:
        size, count = _number(item.get("size")), _number(item.get("array_len", 1))
        if size is None or count is None or size * count > end - offset:
            raise _UnexplainedBytes
        name, kind = _text(item.get("name")), _text(item.get("type"))
        length = size * count
        if "array_len" in item or "struct" in item or "fields" in item or kind in _COMPOUND:
            value, known = self._value(
                item, kind, offset, offset + length, count if "array_len" in item else None, depth
            )
        else:
            value, known = decode_one(kind, self._body[offset : offset + length])
        return Field(name, kind, offset, length, value, _number(item.get("index")), not known)

    def _value(
        self,
        item: Mapping[str, Any],
        kind: str,
        offset: int,
        end: int,
        count: int | None,
        depth: int,
    ) -> tuple[Value, bool]:
        """Return the value, and whether its type is known; otherwise it is bytes."""
        nested = item.get("struct", item)
        if kind in LISTS and count is None and depth < DEPTH_MAX:
            states = self._list(item, kind, offset, end, depth + 1)
            return (self._body[offset:end], False) if states is None else (states, True)
        if isinstance(nested, dict) and "fields" in nested and kind not in LISTS:
            if depth >= DEPTH_MAX or not self._afford((count or 1) * _listed(nested)):
                return self._body[offset:end], False
            if count is None:
                return self.bounded(nested, offset, end, depth + 1), True
            size = (end - offset) // (count or 1)
            return tuple(
                self.bounded(nested, offset + n * size, offset + (n + 1) * size, depth + 1)
                for n in range(count)
            ), True
        data = self._body[offset:end]
        if not self._afford((count or 0) // _ELEMENTS_A_VALUE):
            return data, False
        if kind in VECTORS and count is None:
            kind, count = VECTORS[kind]
        return decode_one(kind, data) if count is None else decode_array(kind, data, count)

    def _list(
        self, item: Mapping[str, Any], kind: str, offset: int, end: int, depth: int
    ) -> tuple[State, ...] | None:
        """Return a list's elements if all match the description: QEMU's JSON keeps only that of the
        last one."""
        explained, self.explained = self.explained, True
        try:
            states = self._elements(item, kind, offset, end, depth)
            return states if self.explained else None
        except _UnexplainedBytes:
            return None
        finally:
            self.explained = explained

    def _elements(
        self, item: Mapping[str, Any], kind: str, offset: int, end: int, depth: int
    ) -> tuple[State, ...]:
        count, key = None, 0
        if kind == GTREE:
            if end - offset < _COUNT.size:
                raise _UnexplainedBytes
            count = _COUNT.unpack_from(self._body, offset)[0]
            offset += _COUNT.size
            key = _key_length(item, count, end - len(_END) - offset) if count else 0
        states: list[State] = []
        while offset + 1 != end or self._body[offset:end] != _END:
            if offset >= end:
                raise _UnexplainedBytes
            if self._body[offset : offset + 1] != _MORE or not self._afford(1 + _listed(item)):
                raise _UnexplainedBytes
            states.append(self._element(item, offset + 1, end, key, depth))
            offset += 1 + states[-1].length
        if count not in (None, len(states)):
            raise _UnexplainedBytes
        return tuple(states)

    def _element(
        self, item: Mapping[str, Any], offset: int, end: int, key: int, depth: int
    ) -> State:
        fields: list[Field] = []
        subsections: list[State] = []
        if key > end - offset:
            raise _UnexplainedBytes
        if key:
            fields.append(Field("key", "buffer", offset, key, self._body[offset : offset + key]))
        stop = self._fill(item, offset + key, end, depth, fields, subsections)
        return _state(item, offset, stop, fields, subsections)

    def _afford(self, values: int) -> bool:
        if values > self._values_left:
            self._values_left = 0
            return False
        self._values_left -= values
        self._budget.spend(values)
        return True


def _frame(described: Mapping[str, Any]) -> bytes:
    """Return the first bytes of a subsection."""
    name = _text(described.get("vmsd_name")).encode("utf-8", "surrogatepass")
    version = _number(described.get("version"))
    if len(name) > 0xFF or version is None or version >= 1 << 32:
        raise _UnexplainedBytes
    return bytes([_SUBSECTION, len(name)]) + name + _VERSION.pack(version)


def _key_length(item: Mapping[str, Any], count: int, length: int) -> int:
    """Return the length of the key of each of ``count`` elements that have ``length`` bytes together.

    QEMU's JSON has the description of the value in place of that of the key.
    """
    value = sum(
        (_number(field.get("size")) or 0) * (_number(field.get("array_len", 1)) or 0)
        for field in _objects(item.get("fields"))
    )
    key = length // count - len(_MORE) - value
    if key <= 0 or length % count or item.get("subsections"):
        raise _UnexplainedBytes
    return key


def _state(
    described: Mapping[str, Any],
    offset: int,
    end: int,
    fields: Iterable[Field],
    subsections: Iterable[State],
) -> State:
    return State(
        _text(described.get("vmsd_name")),
        _number(described.get("version")),
        offset,
        end - offset,
        tuple(fields),
        tuple(subsections),
    )


def _is_doubtful(item: Mapping[str, Any]) -> bool:
    """Return whether the real length of a field may differ from the description."""
    fixed = width(_text(item.get("type")), item["size"])
    return item["size"] != fixed if fixed is not None else item.get("array_len") is not None


def _objects(value: object) -> list[dict[str, Any]]:
    """Return the objects in a list; QEMU writes nothing else there."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _number(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _listed(described: Mapping[str, Any]) -> int:
    """Return the cost of decoding a state once."""
    listed = (described.get("fields"), described.get("subsections"))
    return 1 + sum(len(items) for items in listed if isinstance(items, list))
