"""Start a twin of a QEMU, which describes the device state of its original.

    original = Original.of_process(pid)
    description = await describe(original, state, sizes, pages)

``xen-save-devices-state`` writes device sections without the JSON description that ``migrate``
writes. So a second QEMU of the same machine (:mod:`pyqmigrate.vm.twin.command`)
loads the sections, with guest memory that is empty except for the firmware's ROMs, and migrates
them into a file in memory, with their description. Its guest does not execute any instruction.

The description is used only if it matches the original's own bytes
(:mod:`pyqmigrate.format.device.described`).

The twin never has more rights than its original: it runs as the same user
(:mod:`pyqmigrate.vm.twin.original`), with known options only, and in a private network namespace if
possible. It is killed when this process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyqmigrate.errors import NotSupported, PyqmigrateError, QemuError, UsageError
from pyqmigrate.format.device.broken_virtio import without_broken
from pyqmigrate.format.device.described import check_described
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.configuration import IGNORE_SHARED
from pyqmigrate.format.stream.description import parse
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.format.stream.writer import encode_head, encode_tail
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.base import Block, Snapshot
from pyqmigrate.vm.cancellation import shielded
from pyqmigrate.vm.guest.device_state import DeviceState, memory_file, read_migrated, sections_of
from pyqmigrate.vm.incoming.incoming_settings import Incoming
from pyqmigrate.vm.incoming.load import take_in
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.image_size import image_size
from pyqmigrate.vm.qemu.launch import QemuSession, launch
from pyqmigrate.vm.record.command import original_command
from pyqmigrate.vm.record.contents import read_record
from pyqmigrate.vm.record.place import record_path
from pyqmigrate.vm.twin.command import Sizes, make_twin
from pyqmigrate.vm.twin.original import Original

__all__ = ["TIMEOUT", "RunningTwin", "describe", "describe_snapshot"]

TIMEOUT = 10.0  # seconds from the state to its description
_POLL = 0.002  # seconds
# Where firmware puts the ROMs of a PC. The device kvm-tpr-opt looks for its own there when it is
# loaded, and fails without it.
_ROMS = range(0xC0000, 0x100000)
Pages = Callable[[str, int, int], bytes]
"""Return guest memory: block name, offset, length in bytes."""


class RunningTwin:
    """A twin that has started and waits for the device state that it describes; end it.

    It can be started before the state is known: starting a QEMU is most of the time that a
    description takes.
    """

    def __init__(self, qemu: QemuSession, files: contextlib.ExitStack) -> None:
        self._qemu, self._files = qemu, files

    @classmethod
    async def start(
        cls, original: Original, blocks: Mapping[str, int], sizes: Sizes
    ) -> RunningTwin:
        """Start a twin of ``original``.

        blocks: the length in bytes of every RAM block, by name.
        sizes: the size in bytes of the image with an id, a node name or a path; None if unknown.

        Raises NotSupported with the reason if no twin is possible.
        """
        with contextlib.ExitStack() as files, _refusals():
            start = await shielded(asyncio.to_thread(_prepare, original, blocks, sizes, files))
            qemu = await launch(
                start.command,
                start.fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            return cls(qemu, files.pop_all())

    async def describe(self, state: DeviceState, pages: Pages) -> bytes:
        """Return the description of ``state``'s sections: JSON text as QEMU writes it. Call it once.

        pages: the guest's memory, which may keep changing: only the firmware's ROMs are read.

        Raises NotSupported with the reason, also if the description does not match ``state``.
        """
        with _refusals():
            stream = await shielded(asyncio.to_thread(_stream, state, pages, self._files))
            await take_in(self._qemu, Incoming({"device-state": stream}, 0))
            theirs = await _migrate(self._qemu, state)
        if theirs.description is None:
            raise NotSupported("the twin wrote no description")
        try:
            return await asyncio.to_thread(
                _checked, state.sections, theirs.sections, theirs.description
            )
        except PyqmigrateError as error:
            raise NotSupported(f"the twin is a different machine: {error}") from error

    async def end(self) -> None:
        """Kill it, and close its files. Shielded from cancellation."""
        try:
            self._qemu.process.kill()  # it has no data to lose
            await self._qemu.end()
        finally:
            self._files.close()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn what a twin fails of into NotSupported."""
    try:
        yield
    except NotSupported:
        raise
    except (PyqmigrateError, OSError) as error:
        # QEMU's output has several lines, and becomes part of a sentence.
        raise NotSupported("; ".join(str(error).splitlines())) from error


async def describe(
    original: Original, state: DeviceState, sizes: Sizes, pages: Pages, *, timeout: float = TIMEOUT
) -> bytes:
    """Start a twin, and return its description as :meth:`RunningTwin.describe` does, in at most
    ``timeout`` seconds. Raises NotSupported with the reason."""
    try:
        async with asyncio.timeout(timeout):
            twin = await RunningTwin.start(original, state.blocks, sizes)
            try:
                return await twin.describe(state, pages)
            finally:
                await twin.end()
    except TimeoutError as error:
        raise NotSupported(f"the twin took longer than {timeout:g} s") from error


def _checked(ours: bytes, theirs: bytes, description: bytes) -> bytes:
    """Return the description of ``theirs`` if it fits ``ours``; NotSupported if it does not."""
    alike, fitting = without_broken(ours, theirs, description)
    check_described(ours, alike, parse(fitting))
    return fitting


async def describe_snapshot(snapshot: Snapshot, command: Sequence[str] | None = None) -> bytes:
    """Return the description of an open snapshot's device state: JSON text as QEMU writes it.

    command: the command line that the VM was started with, the program first; None is that of the
        record beside the snapshot. Only the sizes of its images are read, and the twin
        does not open them.

    Raises NotSupported with the reason if no twin is possible, UsageError for an invalid or missing
    command line, SnapshotError, TargetError.
    """
    sizes: dict[str, int] = {}
    line = CommandLine.parse(command) if command else _recorded(snapshot, sizes)
    state = await asyncio.to_thread(_state_of, snapshot)
    return await describe(
        Original.of_command(line),
        state,
        lambda name: sizes.get(name) or image_size(name),
        lambda name, offset, length: snapshot.blocks[name].read(offset, length),
    )


def _recorded(snapshot: Snapshot, sizes: dict[str, int]) -> CommandLine:
    """Return the command line of the record beside a snapshot; add its images to ``sizes``."""
    place = snapshot.source.place or snapshot.source.name
    path = record_path(place)
    record = read_record(place)
    if record is None:
        raise UsageError(
            f"the snapshot's machine is unknown because there is no {path.name}: give the VM's "
            "command line after --"
        )
    for disk in record.disks:
        sizes |= dict.fromkeys((disk.device, disk.node, disk.file), disk.images[0].size)
    return original_command(record, path)


def _state_of(snapshot: Snapshot) -> DeviceState:
    stream = snapshot.stream
    devices = [s for s in stream.sections if s.kind is SectionKind.FULL]
    blocks: dict[str, Block] = {**snapshot.blocks}
    return DeviceState(
        machine=stream.machine,
        page_size=next(block.page_size for block in blocks.values()),
        target_page_bits=stream.target_page_bits,
        uuid=stream.uuid,
        blocks={name: block.length for name, block in blocks.items()},
        carried={},
        sections=sections_of(snapshot.source, stream),
        devices=tuple((section.name, section.instance_id) for section in devices),
        description=None,
        run_state=None,
        switchover_start=False,
    )


@dataclass(frozen=True)
class _Start:
    """The command of a twin, and the descriptors it inherits."""

    command: CommandLine
    fds: tuple[int, ...]


def _prepare(
    original: Original, blocks: Mapping[str, int], sizes: Sizes, stack: contextlib.ExitStack
) -> _Start:
    """Make the files of a twin; ``stack`` closes them."""
    fds: list[int] = []

    def memory(length: int) -> str:
        fd = os.memfd_create("twin-memory", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.ftruncate(fd, length)
        fds.append(fd)
        return f"/proc/self/fd/{fd}"

    twin = make_twin(original.command, blocks, sizes, memory)
    before = original.words_before()
    if twin.taps and "unshare" not in before:
        raise NotSupported("a tap device has no stand-in without a private network namespace")
    command = twin.command
    if original.program >= 0:
        fds.append(original.program)
        program = f"/proc/self/fd/{original.program}"
        if command.before:  # a loader that runs QEMU's program
            command = command._replace(before=(program, *command.before[1:]))
        else:
            command = command._replace(program=program)
    command = command._replace(before=(*before, *command.before))
    return _Start(command, tuple(fds))


def _stream(state: DeviceState, pages: Pages, stack: contextlib.ExitStack) -> int:
    """Make a mapped-ram file in memory with all blocks, but only the pages of the ROMs."""
    fd = os.memfd_create("twin-stream", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    head = encode_head(
        state.machine,
        [BlockSpec(name, length, state.page_size) for name, length in state.blocks.items()],
        target_page_bits=state.target_page_bits,
        uuid=state.uuid,
    )
    for piece in head.pieces:
        os.pwrite(fd, piece.data, piece.offset)
    for block in head.blocks:
        if block.length >= _ROMS.stop:
            _put_roms(fd, block, pages(block.name, _ROMS.start, len(_ROMS)))
    os.pwrite(
        fd,
        encode_tail(
            settings=head.configuration,
            sections=state.sections,
            description=state.description,
            page_size=state.page_size,
        ),
        head.tail_offset,
    )
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, reader)
    return reader


def _put_roms(fd: int, block: BlockLayout, data: bytes) -> None:
    first, end = _ROMS.start // block.page_size, _ROMS.stop // block.page_size
    bits = (1 << end) - (1 << first)
    os.pwrite(fd, bits.to_bytes(-(-end // 8), "little"), block.bitmap_offset)
    os.pwrite(fd, data, block.pages_offset + _ROMS.start)


async def _migrate(qemu: QemuSession, state: DeviceState) -> DeviceState:
    """Return the twin's state as ``migrate`` writes it: described, without guest memory."""
    monitor = qemu.monitor
    await monitor.execute(
        "migrate-set-capabilities",
        {
            "capabilities": [
                {"capability": "mapped-ram", "state": False},
                {"capability": IGNORE_SHARED, "state": True},
            ]
        },
    )
    await monitor.execute("migrate-set-parameters", {"max-bandwidth": 0})
    with memory_file() as (written, read):
        async with monitor.fdset({"device-state": written}) as fdset:
            await monitor.execute("migrate", {"uri": f"file:/dev/fdset/{fdset}"})
            while (answer := await monitor.execute("query-migrate"))["status"] != "completed":
                if answer["status"] in ("failed", "cancelled"):
                    raise QemuError(f"the twin's migration failed: {answer.get('error-desc', '')}")
                await asyncio.sleep(_POLL)
            return await asyncio.to_thread(
                read_migrated, Descriptors(read), elsewhere=[*state.blocks]
            )
