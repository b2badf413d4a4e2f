"""Decode the device state of any migration file, without QEMU.

    found = devices("/snap/guest.mapped", name="cpu")
    for device in found.devices:
        print(device.section_id, device.name, device.state["env.eip"])
    for cpu in cpu_registers(found.devices):
        print(cpu.index, cpu.general)

:mod:`pyqmigrate.format.device.values` describes the values.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.errors import UsageError
from pyqmigrate.format.device.decode import DescribedStream, decode_devices, described_by
from pyqmigrate.format.device.values import Device
from pyqmigrate.format.stream.description import describes_devices
from pyqmigrate.format.stream.device_only import read_device_sections
from pyqmigrate.format.stream.wire import (
    MAGIC,
    PREAMBLE,
    TYPE_CONFIGURATION,
    VERSION,
    Section,
    SectionKind,
)
from pyqmigrate.io.input import Source
from pyqmigrate.io.job import Progress
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import snapshot_of

__all__ = ["Devices", "devices"]


@dataclass(frozen=True)
class Devices:
    """The selected device sections of a file, in the order of the stream.

    ``machine`` is None in a file of device state alone. ``described`` is False if the file does not
    describe them: each is opaque then, or one buffer. ``opaque_tail`` says that the sections could
    not be separated up to the end: the last ones are missing.
    """

    machine: str | None
    described: bool
    opaque_tail: bool
    devices: tuple[Device, ...]


def devices(
    target: Snapshot | Target,
    *,
    offset: int | None = None,
    name: str | None = None,
    section_id: int | None = None,
    page_size: int | None = None,
    index: str | os.PathLike[str] | None = None,
    description: bytes | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Devices:
    """Decode the device state of a file of any kind, and wait.

    target: an open snapshot, which stays open; or a path (of a pipe too), a ``file:`` URI or
        Descriptors of a snapshot, or of a file that ``xen-save-devices-state`` wrote.
    offset, page_size, index: as for ``open_snapshot``; not for an open snapshot.
    name, section_id: select devices by name, and by section id.
    description: JSON text that describes the sections, instead of the file's own
        (:func:`pyqmigrate.vm.twin.twin.describe_snapshot`).
    progress: called while a sequential stream is read through, as for a load.

    Raises UsageError if no device is selected, SnapshotError for a damaged file, NotSupported for a
    stream that cannot be read to its end, or for more than 96 MiB or 262144 values in the selected
    devices, TargetError.
    """
    check("name", name, str, type(None))
    check("section_id", section_id, int, type(None))
    check("page_size", page_size, int, type(None))
    check("index", index, str, os.PathLike, type(None))
    check("description", description, bytes, type(None))
    check_callback("progress", progress)
    if isinstance(target, Snapshot):
        if (offset, page_size, index) != (None, None, None):
            raise UsageError("offset, page_size and index belong to the opening of the snapshot")
        return _decode_snapshot(target, name, section_id, description, progress)
    stream_file = StreamFile.open(target, offset=offset, allow_pipe=True)
    with contextlib.closing(stream_file):
        if _is_state_alone(stream_file):
            source = stream_file.source
            if source.run_out is not None:
                source.run_out()
            stream = _StateAlone(read_device_sections(source))
            return _decode(source, described_by(stream, description), None, False, name, section_id)
        if stream_file.increment is not None:
            stream_file = stream_file.without_header()  # device state needs no base
        with snapshot_of(stream_file, page_size=page_size, index=index) as snapshot:
            return _decode_snapshot(snapshot, name, section_id, description, progress)


def _decode_snapshot(
    snapshot: Snapshot,
    name: str | None,
    section_id: int | None,
    description: bytes | None,
    progress: Callable[[Progress], object] | None,
) -> Devices:
    stream = snapshot.read_through(progress)
    return _decode(
        snapshot.source,
        described_by(stream, description),
        stream.machine,
        stream.opaque_tail,
        name,
        section_id,
    )


def _decode(
    source: Source,
    stream: DescribedStream,
    machine: str | None,
    opaque_tail: bool,
    name: str | None,
    section_id: int | None,
) -> Devices:
    found = tuple(decode_devices(source, stream, name=name, section_id=section_id))
    if not found and (name is not None or section_id is not None):
        raise _unknown(stream, name, section_id)
    return Devices(machine, describes_devices(stream.description), opaque_tail, found)


def _unknown(stream: DescribedStream, name: str | None, section_id: int | None) -> UsageError:
    wanted = [] if name is None else [f"the name {name!r}"]
    wanted += [] if section_id is None else [f"the id {section_id}"]
    present = ", ".join(
        f"{section.section_id} {section.name!r}"
        for section in stream.sections
        if section.kind is SectionKind.FULL
    )
    return UsageError(
        f"no device section has {' and '.join(wanted)}; the file has: {present or 'none'}"
    )


def _is_state_alone(stream_file: StreamFile) -> bool:
    """Whether a section comes where every other stream has its configuration."""
    if stream_file.offset:
        return False
    head = stream_file.source.read_at(0, PREAMBLE.size)
    if len(head) < PREAMBLE.size:
        return False
    magic, version, kind = PREAMBLE.unpack(head)
    return bool(magic == MAGIC and version == VERSION and kind != TYPE_CONFIGURATION)


@dataclass(frozen=True)
class _StateAlone:
    """The sections of a file of device state alone."""

    sections: Sequence[Section]
    description: Mapping[str, Any] | None = None
