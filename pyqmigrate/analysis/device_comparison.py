"""Compare the device state of two snapshots: which devices differ, and in which fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pyqmigrate.analysis.naming import naming
from pyqmigrate.analysis.report import DeviceDiff, FieldDiff
from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.device.values import Device, State, Value
from pyqmigrate.format.stream.wire import RAM_NAME, SectionKind
from pyqmigrate.io.input import Source
from pyqmigrate.io.job import Progress
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.devices import devices

__all__ = ["compare_devices", "compare_fields"]

_PIECE = 1 << 20  # bytes read at a time
_Key = tuple[str, int]
_Range = tuple[int, int]


def compare_devices(a: Snapshot, b: Snapshot) -> tuple[tuple[DeviceDiff, ...], bool]:
    """Return the devices whose state differs, in the order of A, and whether the rest differs, which
    cannot be separated into devices.

    Both were read through. Raises SnapshotError if a file has become shorter, TargetError.
    """
    ours, theirs = _bodies(a), _bodies(b)
    found = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        mine, other = ours.get(key), theirs.get(key)
        if mine is None or other is None or not _equal(a.source, mine, b.source, other):
            sizes = None if mine is None else _size(mine), None if other is None else _size(other)
            found.append(DeviceDiff(*key, sizes))
    return tuple(found), not _equal(a.source, [_tail(a)], b.source, [_tail(b)])


def _bodies(snapshot: Snapshot) -> dict[_Key, list[_Range]]:
    """Return where the state of each device is: ``(offset, length)`` of its sections."""
    found: dict[_Key, list[_Range]] = {}
    for section in snapshot.stream.sections:
        if section.kind is SectionKind.COMMAND:
            continue
        if section.name == RAM_NAME and section.kind is not SectionKind.FULL:
            continue
        place = section.body_offset, section.body_length
        found.setdefault((section.name, section.instance_id), []).append(place)
    return found


def _tail(snapshot: Snapshot) -> _Range:
    """Return where the device state is that could not be separated: offset and length."""
    stream = snapshot.stream
    if not stream.opaque_tail:
        return 0, 0
    last = max((s.offset + s.length for s in stream.sections), default=stream.ram_end)
    end = stream.end if stream.description_offset is None else stream.description_offset
    return last, max(end - last, 0)


def _size(ranges: Sequence[_Range]) -> int:
    return sum(length for _, length in ranges)


def _equal(a: Source, of_a: Sequence[_Range], b: Source, of_b: Sequence[_Range]) -> bool:
    if _size(of_a) != _size(of_b):
        return False
    left, right = _pieces(a, of_a), _pieces(b, of_b)
    mine = other = b""
    while True:
        mine, other = mine or next(left, b""), other or next(right, b"")
        length = min(len(mine), len(other))
        if length == 0:
            return True
        if mine[:length] != other[:length]:
            return False
        mine, other = mine[length:], other[length:]


def _pieces(source: Source, ranges: Sequence[_Range]) -> Iterator[bytes]:
    for offset, length in ranges:
        end = offset + length
        while offset < end:
            data = source.read_at(offset, min(_PIECE, end - offset))
            if not data:
                raise SnapshotError("the file became shorter during the comparison", offset=offset)
            yield data
            offset += len(data)


def compare_fields(
    a: Snapshot,
    b: Snapshot,
    differing: Sequence[DeviceDiff],
    progress: Callable[[Progress], object] | None,
) -> tuple[DeviceDiff, ...]:
    """Return these devices with the fields that differ. Raises the errors of ``devices``."""
    if all(device.only_in for device in differing):
        return tuple(differing)
    ours, theirs = _decoded(a, progress), _decoded(b, progress)
    found = []
    for device in differing:
        key = device.name, device.instance_id
        if device.only_in is None and key in ours and key in theirs:
            device = replace(device, fields=tuple(_fields(ours[key], theirs[key])))
        found.append(device)
    return tuple(found)


def _decoded(
    snapshot: Snapshot, progress: Callable[[Progress], object] | None
) -> dict[_Key, Device]:
    with naming(snapshot):
        found = devices(snapshot, progress=progress).devices
    return {(device.name, device.instance_id): device for device in found}


def _fields(a: Device, b: Device) -> Iterator[FieldDiff]:
    if a.version_id != b.version_id:
        yield FieldDiff("version_id", a.version_id, b.version_id)
    ours, theirs = leaves(a.state), leaves(b.state)
    for path, value in ours.items():
        if path not in theirs:
            yield FieldDiff(path, value, None, "a")
        elif theirs[path] != value or type(theirs[path]) is not type(value):
            yield FieldDiff(path, value, theirs[path])
    for path, value in theirs.items():
        if path not in ours:
            yield FieldDiff(path, None, value, "b")


def leaves(state: State) -> dict[str, Value]:
    """Return the values in a tree by their paths: ``env.segs[1].base``.

    A subsection's name is part of the path. Bytes that the description does not explain are named
    ``?``; further fields of one name in one place have ``#2``, ``#3`` behind it.
    """
    found: dict[str, Value] = {}
    _collect(state, "", found)
    return found


def _collect(state: State, prefix: str, found: dict[str, Value]) -> None:
    """Add the leaves below ``prefix``; the depth is that of decoding, which is bounded."""
    seen: Counter[str] = Counter()

    def place(name: str) -> str:
        seen[name] += 1
        again = f"#{seen[name]}" if seen[name] > 1 else ""
        return f"{prefix}{name}{again}"

    for field in state.fields:
        path, value = place(field.label or "?"), field.value
        if isinstance(value, State):
            _collect(value, f"{path}.", found)
        elif isinstance(value, tuple) and any(isinstance(item, State) for item in value):
            for number, item in enumerate(value):
                if isinstance(item, State):
                    _collect(item, f"{path}[{number}].", found)
        else:
            found[path] = value
    for subsection in state.subsections:
        _collect(subsection, f"{place(subsection.name)}.", found)
