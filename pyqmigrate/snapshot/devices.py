"""Looking into the device state of any migration file, without QEMU.

    found = devices("/snap/guest.mapped", name="cpu")
    for device in found.devices:
        print(device.section_id, device.name, device.state["env.eip"])
    for cpu in cpu_registers(found.devices):
        print(cpu.index, cpu.general)

What the values are is told in :mod:`pyqmigrate.format.device.values`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.errors import UsageError
from pyqmigrate.format.device.cpu import cpu_registers
from pyqmigrate.format.device.decode import DescribedStream, decode_devices, described_by
from pyqmigrate.format.device.values import Device
from pyqmigrate.format.stream.description import describes_devices
from pyqmigrate.format.stream.device_only import walk_devices
from pyqmigrate.format.stream.wire import (
    MAGIC,
    PREAMBLE,
    TYPE_CONFIGURATION,
    VERSION,
    Section,
    SectionKind,
)
from pyqmigrate.io.job import Progress
from pyqmigrate.io.pipe import ForwardInput
from pyqmigrate.io.target import InputFile, Target
from pyqmigrate.snapshot.base import Snapshot, locate
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.sequential import SequentialSnapshot

__all__ = ["Devices", "cpu_registers", "devices"]


@dataclass(frozen=True)
class Devices:
    """The device sections of a file, as far as they were asked for, in the order of the stream.

    ``machine`` is None in a file of device state alone. ``described`` is False where the file does
    not describe them: each then is opaque, or one buffer. ``opaque_tail`` says that the sections
    could not be separated up to the end: the last ones are missing.
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
    """Decode the device state of a file, of whichever kind it is.

    target: an opened snapshot, which stays open; or a path (of a pipe too), a ``file:`` URI or
        Descriptors: what ``open_snapshot`` takes, or what ``xen-save-devices-state`` wrote.
    offset, page_size, index: as for ``open_snapshot``, which must have had them where the snapshot
        is open already.
    name, section_id: only devices of this name, and of this section id.
    description: JSON text that describes the sections, instead of what the file has
        (:func:`pyqmigrate.vm.twin.twin.describe_snapshot`).
    progress: called while a sequential stream is read through, as for a load.

    Blocks until done. Raises UsageError where no device is selected, SnapshotError for a damaged
    file, NotSupported for a stream that cannot be walked, or more than 96 MiB or 262144 values in
    what is selected, TargetError.
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
    located = locate(target, offset, piped=True)
    with contextlib.ExitStack() as stack:
        stack.callback(located.source.close)
        if _is_state_alone(located.source):
            if isinstance(located.source, ForwardInput):
                located.source.run_out()
            stream = _StateAlone(walk_devices(located.source))
            return _decode(
                located.source, described_by(stream, description), None, False, name, section_id
            )
        stack.pop_all()
    with open_snapshot(located, page_size=page_size, index=index) as snapshot:
        return _decode_snapshot(snapshot, name, section_id, description, progress)


def _decode_snapshot(
    snapshot: Snapshot,
    name: str | None,
    section_id: int | None,
    description: bytes | None,
    progress: Callable[[Progress], object] | None,
) -> Devices:
    if isinstance(snapshot, SequentialSnapshot):
        snapshot.read_through(progress)
    stream = snapshot.stream
    return _decode(
        snapshot.source,
        described_by(stream, description),
        stream.machine,
        stream.opaque_tail,
        name,
        section_id,
    )


def _decode(
    source: InputFile,
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
    there = ", ".join(
        f"{section.section_id} {section.name!r}"
        for section in stream.sections
        if section.kind is SectionKind.FULL
    )
    return UsageError(f"no device section has {' and '.join(wanted)}; there are: {there or 'none'}")


def _is_state_alone(source: InputFile) -> bool:
    """Whether a section follows where every other stream has its configuration."""
    head = source.read_at(source.offset, PREAMBLE.size)
    if source.offset or len(head) < PREAMBLE.size:
        return False
    magic, version, kind = PREAMBLE.unpack(head)
    return bool(magic == MAGIC and version == VERSION and kind != TYPE_CONFIGURATION)


@dataclass(frozen=True)
class _StateAlone:
    """The sections of a file that has nothing else."""

    sections: Sequence[Section]
    description: Mapping[str, Any] | None = None
