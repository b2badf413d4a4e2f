"""One incoming migration: its source, what it brings, and for whom."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from uuid import UUID

from pyqmigrate.errors import BlockMismatch, NotSupported, SnapshotError
from pyqmigrate.format.device.sections import DeviceSection
from pyqmigrate.format.stream.configuration import IGNORE_SHARED, Configuration
from pyqmigrate.format.stream.wire import Section, SectionKind
from pyqmigrate.format.stream.writer import Stream, parse
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.bitmap_order import find_order
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, RamBlock
from pyqmigrate.io.target import DirectIO, InputFile
from pyqmigrate.migration.fdset import FdSets
from pyqmigrate.migration.fdset_checks import Direction
from pyqmigrate.migration.rules import effective_direct_io
from pyqmigrate.migration.target import TakeFd, target_of
from pyqmigrate.qapi.address import Address
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.snapshot.load.mapped_ram import LoadReport, start_load
from pyqmigrate.snapshot.load.sequential import SequentialReader

__all__ = ["Source"]

_DEVICE_MAX = 256 << 20  # bytes of one device's state; real ones have some KiB to some MiB


class Source:
    """The file of an incoming migration, open. What it borrows goes back with ``close``.

    Raises FdsetError, TargetError or UsageError when it cannot be opened; what is in it is
    looked at by :meth:`load`.
    """

    def __init__(
        self,
        address: Address,
        capabilities: Capabilities,
        parameters: Parameters,
        *,
        policy: Policy,
        fdsets: FdSets,
        take_fd: TakeFd,
        uuid: UUID | None,
    ) -> None:
        self._policy = policy
        self._capabilities = capabilities
        self._uuid = uuid
        self._parameters = parameters
        self._direct = effective_direct_io(capabilities, parameters)
        with contextlib.ExitStack() as stack:
            target = target_of(
                address,
                Direction.LOAD,
                direct_io=self._direct,
                policy=policy,
                fdsets=fdsets,
                take_fd=take_fd,
                resources=stack,
            )
            self._input = InputFile(target)
            stack.callback(self._input.close)
            self._resources = stack.pop_all()

    def load(self, blocks: Sequence[RamBlock]) -> tuple[list[DeviceSection], LoadReport]:
        """Load the blocks and return the devices' sections, in the order of the stream.

        Blocks of the stream that are not among ``blocks`` are left out. Raises SnapshotError,
        BlockMismatch, NotSupported, TargetError, GuestMemoryError.
        """
        memories: Mapping[str, Memory] = {block.name: block.memory for block in blocks}
        if not self._capabilities.mapped_ram:
            return self._load_sequential(memories)
        try:
            stream = parse(self._input, self._input.offset)
        except NotSupported as error:
            raise SnapshotError(
                "Capability mapped-ram is on, but received capability is off"
            ) from error
        self._check_settings(stream)
        return self._load_mapped(stream, memories)

    def _load_sequential(
        self, memories: Mapping[str, Memory]
    ) -> tuple[list[DeviceSection], LoadReport]:
        try:
            reader = SequentialReader(self._input, memories, skip_unknown_blocks=True)
        except NotSupported as error:
            raise SnapshotError(
                "Capability mapped-ram is off, but received capability is on"
            ) from error
        with contextlib.closing(reader):
            self._check_settings(reader.configuration)
            report = reader.run()
        return list(report.devices), report

    def _check_settings(self, received: Configuration | Stream) -> None:
        """The stream's must be ours; an identity that one side does not tell passes."""
        on = IGNORE_SHARED in received.capabilities
        if on != self._capabilities.x_ignore_shared:
            state = {True: "on", False: "off"}
            raise SnapshotError(
                f"Capability x-ignore-shared is {state[not on]}, but received capability is "
                f"{state[on]}"
            )
        if not self._capabilities.validate_uuid or None in (received.uuid, self._uuid):
            return
        if UUID(bytes=received.uuid) != self._uuid:
            raise SnapshotError(
                f"UUID received is {UUID(bytes=received.uuid)} and local is {self._uuid}"
            )

    def _load_mapped(
        self, stream: Stream, memories: Mapping[str, Memory]
    ) -> tuple[list[DeviceSection], LoadReport]:
        if (
            self._policy.compat
            and not self._policy.qemu.external_blocks
            and IGNORE_SHARED in stream.capabilities
        ):
            raise SnapshotError(
                "QEMU before 11.0 cannot load mapped-ram together with x-ignore-shared"
            )
        missing = [name for name in memories if name not in {b.name for b in stream.blocks}]
        if missing:
            raise BlockMismatch(f"the stream has no block {missing[0]!r}")
        with contextlib.ExitStack() as stack:
            chosen = []
            order = find_order(self._input, stream.blocks, stream.machine)
            for layout in stream.blocks:
                if layout.name in memories and not layout.external:
                    bitmap = Bitmap.read_from(self._input, layout, order)
                    stack.callback(bitmap.close)
                    chosen.append((layout, bitmap))
            several = self._capabilities.multifd
            job: Job[LoadReport] = start_load(
                self._input,
                chosen,
                {layout.name: memories[layout.name] for layout, _ in chosen},
                channels=self._parameters.multifd_channels if several else 1,
                direct_io=DirectIO.ON if self._direct else DirectIO.OFF,
            )
            report = job.result()
        return self._devices(stream.sections), report

    def _devices(self, sections: Sequence[Section]) -> list[DeviceSection]:
        found = []
        for section in sections:
            if section.kind is not SectionKind.FULL:
                continue
            if section.body_length > _DEVICE_MAX:
                raise SnapshotError(
                    f"the state of device {section.name!r} has {section.body_length} bytes",
                    offset=section.offset,
                )
            data = self._input.read_at(section.body_offset, section.body_length)
            found.append(DeviceSection(section.name, data, section.instance_id, section.version_id))
        return found

    def close(self) -> None:
        """May be repeated."""
        self._resources.close()
