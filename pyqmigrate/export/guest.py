"""A snapshot's guest: its device state, and where in its address space its blocks are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.address_space.physical_map import physical_map
from pyqmigrate.format.address_space.placement import GivenPlacement, Placement
from pyqmigrate.format.device.decode import decode_devices, described_by
from pyqmigrate.format.device.values import Device
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.io.job import Progress
from pyqmigrate.log import logger
from pyqmigrate.snapshot.base import Block, Snapshot

__all__ = ["Guest"]

_ACPI_TABLES = "/rom@etc/acpi/tables"
_ACPI_TABLES_MAX = 8 << 20  # QEMU's are 2 MiB at most
_DECODED_DEVICE_MAX = 1 << 20  # bytes; memory and CPUs need less, a graphics card has more


@dataclass(frozen=True)
class Guest:
    """``devices`` are those of at most a MiB, none if they cannot be separated; ``ranges`` are the
    ranges of the guest's address space that show blocks, in order, and ``unplaced`` the blocks that
    no range shows."""

    devices: tuple[Device, ...]
    ranges: tuple[Placement, ...]
    unplaced: tuple[str, ...]

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        given: Sequence[GivenPlacement],
        progress: Callable[[Progress], object] | None,
        max_ram_below_4g: int | None = None,
        description: bytes | None = None,
    ) -> Guest:
        """Read the guest of a snapshot. ``description`` replaces the snapshot's own.

        Raises the errors of physical_map, SnapshotError, and UsageError if a block that is needed is
        in another file.
        """
        snapshot.prepare_random_reads(progress)
        try:
            devices = tuple(
                decode_devices(
                    snapshot.source,
                    described_by(snapshot.stream, description),
                    longest=_DECODED_DEVICE_MAX,
                )
            )
        except NotSupported as error:  # it is too large
            logger.warning("the device state is not decoded: %s", error)
            devices = ()
        blocks: dict[str, Block] = {**snapshot.blocks}
        ranges = physical_map(
            snapshot.machine,
            {name: block.length for name, block in blocks.items()},
            # A file without device state was not written by QEMU.
            devices if _has_devices(snapshot) else None,
            given=given,
            acpi_tables=_acpi_tables(blocks.get(_ACPI_TABLES)),
            max_ram_below_4g=max_ram_below_4g,
        )
        for placement in ranges:
            _check(placement, blocks[placement.block])
        placed = {placement.block for placement in ranges}
        return cls(devices, ranges, tuple(name for name in blocks if name not in placed))


def _has_devices(snapshot: Snapshot) -> bool:
    return any(section.kind is SectionKind.FULL for section in snapshot.stream.sections)


def _acpi_tables(block: Block | None) -> bytes:
    if block is None or block.external or block.length > _ACPI_TABLES_MAX:
        return b""
    return block.read(0, block.length)


def _check(placement: Placement, block: Block) -> None:
    if block.external:
        raise UsageError(
            f"the content of block {block.name!r} is not in this snapshot: convert it to mapped-ram"
            " first, with --memory"
        )
    if placement.offset % block.page_size or placement.length % block.page_size:
        raise UsageError(
            f"the part of block {block.name!r} at {placement.address:#x} is not whole pages of "
            f"{block.page_size} bytes"
        )
