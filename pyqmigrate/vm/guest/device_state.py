"""What QEMU writes of a guest whose pages we write: its device state, and the small blocks.

QEMU has two ways to write it:

- ``migrate`` with ``x-ignore-shared``, ``mapped-ram`` and ``multifd`` being off: a whole sequential
  stream, in which guest memory that is a shared file is left out (:func:`read_migrated`);
- ``xen-save-devices-state``: the device sections and nothing else; what else a stream has, the
  caller knows from QEMU's monitor (:func:`read_devices`).

Both open the file for writing only, so that a fdset needs a descriptor of just that mode; here it
is read through another. :func:`start_snapshot` then writes pages and device state as one
mapped-ram file::

    state = read_migrated(Descriptors(fd))
    report = start_snapshot("/snap/guest.mapped", state, {"pc.ram": FileMemory(ram)}).wait()

The second heeds no migration blocker: QEMU 10.0.2 dies of it with a device that cannot be migrated
(NVMe), which ``query-migrate`` tells beforehand in ``blocked-reasons``. It also leaves out, without
a word, all state that is written in several parts (VFIO, dirty bitmaps).

The guest must stand still from the moment its device state was written until the job has ended.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import BlockMismatch, NotSupported, SnapshotError, UsageError
from pyqmigrate.format.device.sections import (
    DeviceSection,
    encode_devices,
    global_state,
    run_state_of,
)
from pyqmigrate.format.stream.description import HEADER_LENGTH as DESCRIPTION_HEADER
from pyqmigrate.format.stream.device_only import HEADER_LENGTH, walk_devices
from pyqmigrate.format.stream.mapped_ram import BlockSpec
from pyqmigrate.format.stream.sequential import SequentialStream
from pyqmigrate.format.stream.wire import RAM_NAME, Section, SectionKind, Stream
from pyqmigrate.io.channels import check_channels
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import FileMemory, Memory, ProcessMemory, RamBlock, SnapshotMemory
from pyqmigrate.io.target import DirectIO, InputFile, Target
from pyqmigrate.snapshot.load.sequential import DEVICE_STATE_MAX, SequentialReader
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport, Sparse

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "DeviceState",
    "memory_file",
    "read_devices",
    "read_migrated",
    "sections_of",
    "start_snapshot",
]

_SWITCHOVER = "switchover-start"
_GLOBAL_STATE = "globalstate"
_RUN_STATE_MAX = 31  # bytes, before a NUL


@dataclass(frozen=True)
class DeviceState:
    """A guest without the pages that somebody else has.

    - ``blocks``: the length in bytes of every RAM block, in the order of the stream.
    - ``carried``: the content of those blocks whose pages QEMU wrote; the others are
      :attr:`external`.
    - ``sections``: the device sections, as they were; ``devices`` their names and instances.
    - ``description``: JSON text that tells the lengths of the sections.
    - ``run_state``: what the guest will be on load (``running``, ``paused``, ...), where told.
    - ``switchover_start``: whether the stream has that command, which machine types of QEMU 10.0
      and later get.
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
        """The blocks whose pages have to come from somewhere else."""
        return tuple(name for name in self.blocks if name not in self.carried)


@contextlib.contextmanager
def memory_file() -> Iterator[tuple[int, int]]:
    """Two opens of an empty file in memory: for writing only, as QEMU wants it, and for reading."""
    with contextlib.ExitStack() as stack:
        read = os.memfd_create("device-state", os.MFD_CLOEXEC)
        stack.callback(os.close, read)
        written = os.open(f"/proc/self/fd/{read}", os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, written)
        yield written, read


def read_migrated(source: Target, *, elsewhere: Collection[str] = ()) -> DeviceState:
    """Read what ``migrate`` wrote: a sequential stream, whole.

    source: a path, or Descriptors (borrowed, open for reading).
    elsewhere: blocks that are external though the stream may have their pages, which are passed
        over: of a memfd, QEMU up to 11.1 at least writes every page all the same.

    The other blocks that the stream has pages of are read into memory. Raises SnapshotError for a
    stream that is damaged or cut, NotSupported for one of another kind and where a device has
    state beside an ordinary section, UsageError, TargetError.
    """
    opened = InputFile(source)
    try:
        head = SequentialReader(opened, {}, skip_unknown_blocks=True)
        head.close()
        memories = {
            block.name: mmap.mmap(-1, block.length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for block in head.blocks
            if block.name not in elsewhere
        }
        report = SequentialReader(opened, memories, skip_unknown_blocks=True).run()
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


def sections_of(source: InputFile, stream: Stream | SequentialStream) -> bytes:
    """Return everything between RAM's END and the end-of-stream byte, if only devices are there.

    Raises SnapshotError where the end of the stream is missing, NotSupported for other sections.
    """
    if not stream.complete:
        raise SnapshotError(
            "the end of the stream is missing: device state is cut off", offset=stream.end
        )
    for section in stream.sections:
        if section.kind is SectionKind.START and section.name != RAM_NAME:
            raise NotSupported(
                f"{section.name!r} has state that is written in several parts, not in one section"
            )
        if section.kind is SectionKind.FULL and section.offset < stream.ram_end:
            raise NotSupported(f"{section.name!r} has state that has to stand before RAM")
    end = stream.end if stream.description_offset is None else stream.description_offset
    ram_end = next(s for s in stream.sections if s.offset == stream.ram_end)
    first = ram_end.offset + ram_end.length
    return _read(source, first, end - 1)


def _description_of(source: InputFile, stream: SequentialStream) -> bytes | None:
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
    """Read what ``xen-save-devices-state`` wrote; the rest is as the monitor tells it.

    source: a path, or Descriptors (borrowed, open for reading).
    machine: the machine type's full name (``pc-q35-10.0``); an empty one loads on any.
    blocks: the length in bytes of every RAM block, as ``info ramblock`` lists them (Used).
    page_size, target_page_bits, uuid: as in :func:`pyqmigrate.format.stream.writer.encode_head`.
    run_state: what the guest is to be on load; None leaves what QEMU wrote, which is ``running``
        even for a paused guest.

    All blocks are external. The description gives each section as one buffer. Raises SnapshotError
    for a file that is damaged or cut, UsageError, TargetError.
    """
    for name, length in blocks.items():
        BlockSpec(name, length, page_size)
    opened = InputFile(source)
    try:
        sections = walk_devices(opened)
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
    raise NotSupported("the device state has no run state that could be changed")


def _body(section: Section) -> slice:
    """Where the section's body is in a file of devices without its header."""
    first = section.body_offset - HEADER_LENGTH
    return slice(first, first + section.body_length)


def _names(sections: Sequence[Section]) -> tuple[tuple[str, int], ...]:
    return tuple((s.name, s.instance_id) for s in sections if s.kind is SectionKind.FULL)


def _read(source: InputFile, start: int, end: int) -> bytes:
    if end - start > DEVICE_STATE_MAX:
        raise NotSupported(
            f"device state of {(end - start) >> 20} MiB; at most {DEVICE_STATE_MAX >> 20} are read"
        )
    data = source.read_at(start, end - start)
    if len(data) != end - start:
        raise SnapshotError("the file became shorter while it was read", offset=start + len(data))
    return data


def start_snapshot(
    target: Target,
    state: DeviceState,
    memories: Mapping[str, Memory],
    *,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    sparse: Sparse | str = Sparse.AUTO,
    reuse: bool = False,
    max_bandwidth: int = 0,
) -> Job[SaveReport]:
    """Begin to write a snapshot that QEMU loads; returns at once.

    memories: where the pages of each external block are; a FileMemory without a length has the
        block's. One given for a carried block is used instead of what the stream had.

    The other arguments are those of :func:`pyqmigrate.api.start_save`, and so are the errors;
    BlockMismatch for memories that are missing, unknown or of another length than their blocks.
    """
    writer = Writer(
        target,
        _ram_blocks(state, memories),
        SaveOptions(
            direct_io=parse_enum(DirectIO, direct_io, "direct_io"),
            sparse=parse_enum(Sparse, sparse, "sparse"),
            channels=check_channels(channels),
            machine=state.machine,
            target_page_bits=state.target_page_bits,
            uuid=state.uuid,
            reuse=reuse,
            max_bandwidth=max_bandwidth,
        ),
    )

    def write() -> SaveReport:
        return writer.run(
            state.sections, state.description, switchover_start=state.switchover_start
        )

    try:
        return Job(writer.channels, writer.total, write)
    except BaseException:
        writer.close()
        raise


def _ram_blocks(state: DeviceState, memories: Mapping[str, Memory]) -> list[RamBlock]:
    unknown = [name for name in memories if name not in state.blocks]
    if unknown:
        raise BlockMismatch(f"the guest has no block {unknown[0]!r}; it has {[*state.blocks]}")
    blocks = []
    for name, length in state.blocks.items():
        memory = memories.get(name, state.carried.get(name))
        if memory is None:
            raise BlockMismatch(f"no memory is given for block {name!r}, and QEMU wrote no page")
        if isinstance(memory, FileMemory) and memory.length is None:
            memory = replace(memory, length=length)
        given = _length(name, memory)
        if given != length:
            raise BlockMismatch(f"memory of block {name!r} has {given} bytes, the guest {length}")
        blocks.append(RamBlock(name, memory, state.page_size))
    return blocks


def _length(name: str, memory: Memory) -> int | None:
    if isinstance(memory, FileMemory | ProcessMemory | SnapshotMemory):
        return memory.length
    try:
        with memoryview(memory) as view:
            return view.nbytes
    except TypeError:
        raise UsageError(f"memory of block {name!r} is none, but {type(memory).__name__}") from None
