"""Looking into the device state of any migration file, without QEMU.

    found = devices("/snap/guest.mapped", name="cpu")
    for device in found.devices:
        print(device.section_id, device.name, device.state["env.eip"])
    for cpu in cpu_registers(found.devices):
        print(cpu.index, cpu.general)

What the values are is told in :mod:`pyqmigrate.format.device_tree`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.cpu_state import cpu_registers
from pyqmigrate.format.device_state import DescribedStream, decode_devices
from pyqmigrate.format.device_tree import Device
from pyqmigrate.format.device_walk import walk_devices
from pyqmigrate.format.elements import (
    MAGIC,
    PREAMBLE,
    TYPE_CONFIGURATION,
    VERSION,
    Section,
    SectionKind,
)
from pyqmigrate.format.stream import parse
from pyqmigrate.io.target import InputTarget, Target
from pyqmigrate.opened import locate
from pyqmigrate.sequential import start_sequential_load

__all__ = ["Devices", "cpu_registers", "devices"]


@dataclass(frozen=True)
class Devices:
    """The device sections of a file, as far as they were asked for, in the order of the stream.

    ``machine`` is None in a file of device state alone. ``described`` is False where the file has
    no description: the devices then are opaque. ``opaque_tail`` says that the sections could not
    be told apart up to the end: the last ones are missing.
    """

    machine: str | None
    described: bool
    opaque_tail: bool
    devices: tuple[Device, ...]


def devices(
    target: Target,
    *,
    offset: int | None = None,
    name: str | None = None,
    section_id: int | None = None,
) -> Devices:
    """Decode the device state of a file, of whichever kind it is.

    target: a path, a ``file:`` URI or Descriptors: a mapped-ram snapshot, a classic stream (which
        has to be read from end to end for it), or what ``xen-save-devices-state`` wrote.
        libvirt's header before the stream is stepped over.
    offset: where the stream starts, bytes; for a path.
    name, section_id: only devices of this name, and of this section id.

    Blocks until done. Raises UsageError where no device is selected, SnapshotError for a damaged
    file, NotSupported for a stream that cannot be walked, is compressed, or has more than 256 MiB
    of device state, TargetError.
    """
    source = locate(target, offset).source
    try:
        stream, machine, opaque = _walk(source)
        found = tuple(decode_devices(source, stream, name=name, section_id=section_id))
        if not found and (name is not None or section_id is not None):
            raise _unknown(stream, name, section_id)
        return Devices(machine, stream.description is not None, opaque, found)
    finally:
        source.close()


def _walk(source: InputTarget) -> tuple[DescribedStream, str | None, bool]:
    """The sections and their description, the machine, and whether sections are missing."""
    if _is_state_alone(source):
        return _StateAlone(walk_devices(source)), None, False
    try:
        mapped = parse(source, source.offset)
    except NotSupported:
        # A classic stream, unless that says so itself. Nothing is loaded of its RAM.
        classic = start_sequential_load(source, {}, skip_unknown_blocks=True).wait().stream
        return classic, classic.machine, classic.opaque_tail
    return mapped, mapped.machine, mapped.opaque_tail


def _unknown(stream: DescribedStream, name: str | None, section_id: int | None) -> UsageError:
    wanted = [] if name is None else [f"the name {name!r}"]
    wanted += [] if section_id is None else [f"the id {section_id}"]
    there = ", ".join(
        f"{section.section_id} {section.name!r}"
        for section in stream.sections if section.kind is SectionKind.FULL
    )
    return UsageError(
        f"no device section has {' and '.join(wanted)}; there are: {there or 'none'}"
    )


def _is_state_alone(source: InputTarget) -> bool:
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
