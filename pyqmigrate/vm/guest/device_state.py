"""Read the device state that QEMU writes when this package writes the guest's pages.

QEMU has two ways to write it:

- ``migrate`` with ``x-ignore-shared``, ``mapped-ram`` and ``multifd`` being off: a whole sequential
  stream, in which guest memory that is a shared file is left out (:func:`read_migrated`);
- ``xen-save-devices-state``: the device sections only; the caller gets the rest of a stream from
  QEMU's monitor (:func:`read_devices`).

Both open the file for writing only, so a fdset needs a write-only descriptor; this module reads
through another one.

``xen-save-devices-state`` ignores migration blockers: QEMU 10.0.2 crashes on a device that cannot
be migrated (NVMe), which ``query-migrate`` reports in ``blocked-reasons``. It also silently omits all
state that is written in several parts (VFIO, dirty bitmaps).

The guest must stay stopped from the moment its device state was written until its pages are saved.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.device.sections import (
    DeviceSection,
    encode_devices,
    global_state,
    run_state_of,
)
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.description import HEADER_LENGTH as DESCRIPTION_HEADER
from pyqmigrate.format.stream.device_only import HEADER_LENGTH, read_device_sections
from pyqmigrate.format.stream.sequential import SequentialStream
from pyqmigrate.format.stream.wire import RAM_NAME, Section, SectionKind, Stream
from pyqmigrate.io.input import InputFile, Source
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.load.sequential import LOADED_STATE_MAX, SequentialReader

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["DeviceState", "memory_file", "read_devices", "read_migrated", "sections_of"]

_SWITCHOVER = "switchover-start"
_GLOBAL_STATE = "globalstate"
_RUN_STATE_MAX = 31  # bytes, before a NUL


@dataclass(frozen=True)
class DeviceState:
    """The state of a guest without the pages that this package writes.

    - ``blocks``: the length in bytes of every RAM block, in the order of the stream.
    - ``carried``: the content of the blocks whose pages QEMU wrote; the others are
      :attr:`external`.
    - ``sections``: the device sections, unchanged; ``devices`` their names and instances.
    - ``description``: JSON text with the lengths of the sections.
    - ``run_state``: the guest's state on load (``running``, ``paused``, ...), if recorded.
    - ``switchover_start``: whether the stream has that command, as machine types of QEMU 10.0 and
      later have.
    """

    machine: str
    page_size: int
    target_page_bits: int | None
    uuid: bytes | None
    blocks: Mapping[str, int]
    carried: Mapping[str, Buffer]
    sections: bytes
    devices: tuple[tuple[str, int], ...]
    description: bytes | None
    run_state: str | None
    switchover_start: bool

    @property
    def external(self) -> tuple[str, ...]:
        """The blocks whose pages are not in this state."""
        return tuple(name for name in self.blocks if name not in self.carried)


@contextlib.contextmanager
def memory_file() -> Iterator[tuple[int, int]]:
    """Open an empty file in memory twice: write-only, as QEMU needs it, and for reading."""
    with contextlib.ExitStack() as stack:
        read = os.memfd_create("device-state", os.MFD_CLOEXEC)
        stack.callback(os.close, read)
        written = os.open(f"/proc/self/fd/{read}", os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, written)
        yield written, read


def read_migrated(source: Target, *, elsewhere: Collection[str] = ()) -> DeviceState:
    """Read a whole sequential stream that ``migrate`` wrote.

    source: a path, or Descriptors (borrowed, open for reading).
    elsewhere: blocks that are external even if the stream has their pages, which are skipped: QEMU
        up to 11.1 at least writes every page of a memfd.

    The other blocks with pages in the stream are read into memory. Raises SnapshotError for a
    damaged or truncated stream, NotSupported for one of another kind, and for a device with state
    outside ordinary sections, UsageError, TargetError.
    """
    opened = InputFile(source)
    try:
        stream_file = StreamFile(opened, opened.offset)
        head = SequentialReader(stream_file, {}, skip_unknown_blocks=True)
        head.close()
        memories = {
            block.name: mmap.mmap(-1, block.length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for block in head.blocks
            if block.name not in elsewhere
        }
        report = SequentialReader(stream_file, memories, skip_unknown_blocks=True).run()
        stream = report.stream
        return DeviceState(
            machine=stream.machine,
            page_size=stream.page_size,
            target_page_bits=stream.target_page_bits,
            uuid=stream.uuid,
            blocks={block.name: block.length for block in stream.blocks},
            carried={n: memory for n, memory in memories.items() if n not in report.skipped},
            sections=sections_of(opened, stream),
            devices=_names(stream.sections),
            description=_description_of(opened, stream),
            run_state=run_state_of(report.devices),
            switchover_start=any(s.name == _SWITCHOVER for s in stream.sections),
        )
    finally:
        opened.close()


def sections_of(source: Source, stream: Stream | SequentialStream) -> bytes:
    """Return what is between RAM and the end-of-stream byte, if only device sections are.

    Raises SnapshotError if the end of the stream is missing, NotSupported for other sections.
    """
    if not stream.complete:
        raise SnapshotError(
            "the end of the stream is missing: device state is cut off", offset=stream.end
        )
    for section in stream.sections:
        if section.kind is SectionKind.START and section.name != RAM_NAME:
            raise NotSupported(
                f"{section.name!r} has state in several parts instead of one section"
            )
        if section.kind is SectionKind.FULL and section.offset < stream.ram_end:
            raise NotSupported(f"{section.name!r} has state that must come before RAM")
    end = stream.end if stream.description_offset is None else stream.description_offset
    return _read(source, stream.after_ram, end - 1)


def _description_of(source: Source, stream: SequentialStream) -> bytes | None:
    if stream.description_offset is None:
        return None
    return _read(source, stream.description_offset + DESCRIPTION_HEADER, stream.end)


def read_devices(
    source: Target,
    *,
    machine: str,
    blocks: Mapping[str, int],
    page_size: int = 4096,
    target_page_bits: int | None = None,
    uuid: bytes | None = None,
    run_state: str | None = None,
) -> DeviceState:
    """Read a file that ``xen-save-devices-state`` wrote; the monitor supplies the rest.

    source: a path, or Descriptors (borrowed, open for reading).
    machine: the machine type's full name (``pc-q35-10.0``); an empty one loads on any.
    blocks: the length in bytes of every RAM block, as ``info ramblock`` lists them (Used).
    page_size, target_page_bits, uuid: as in :func:`pyqmigrate.format.stream.writer.encode_head`.
    run_state: the state of the guest on load; None keeps the one that QEMU wrote, which is
        ``running`` even for a paused guest.

    All blocks are external. The description gives each section as one buffer. Raises SnapshotError
    for a damaged or truncated file, UsageError, TargetError.
    """
    for name, length in blocks.items():
        BlockSpec(name, length, page_size)
    opened = InputFile(source)
    try:
        sections = read_device_sections(opened)
        data = bytearray(_read(opened, HEADER_LENGTH, opened.size - 1))
    finally:
        opened.close()
    if run_state is not None:
        _set_run_state(data, sections, run_state)
    devices = [
        DeviceSection(s.name, bytes(data[_body(s)]), s.instance_id, s.version_id) for s in sections
    ]
    return DeviceState(
        machine=machine,
        page_size=page_size,
        target_page_bits=target_page_bits,
        uuid=uuid,
        blocks=dict(blocks),
        carried={},
        sections=bytes(data),
        devices=_names(sections),
        description=encode_devices(devices, page_size)[1],
        run_state=run_state_of(devices),
        switchover_start=False,
    )


def _set_run_state(data: bytearray, sections: Sequence[Section], run_state: str) -> None:
    if not run_state.isascii() or not 1 <= len(run_state) <= _RUN_STATE_MAX:
        raise UsageError(f"{run_state!r} is not a run state")
    wanted = global_state(run_state).data
    for section in sections:
        if section.name == _GLOBAL_STATE and section.body_length == len(wanted):
            data[_body(section)] = wanted
            return
    raise NotSupported("the device state has no run state that can be changed")


def _body(section: Section) -> slice:
    """Return the range of the section's body in a device-only file without its header."""
    first = section.body_offset - HEADER_LENGTH
    return slice(first, first + section.body_length)


def _names(sections: Sequence[Section]) -> tuple[tuple[str, int], ...]:
    return tuple((s.name, s.instance_id) for s in sections if s.kind is SectionKind.FULL)


def _read(source: Source, start: int, end: int) -> bytes:
    if end - start > LOADED_STATE_MAX:
        raise NotSupported(
            f"device state has {(end - start) >> 20} MiB; the limit is {LOADED_STATE_MAX >> 20} MiB"
        )
    data = source.read_at(start, end - start)
    if len(data) != end - start:
        raise SnapshotError("the file shrank while it was being read", offset=start + len(data))
    return data
