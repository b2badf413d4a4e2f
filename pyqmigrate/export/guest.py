"""What a snapshot says of its guest: device state, and where in its address space its blocks are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.address_space.physical_map import physical_map
from pyqmigrate.format.address_space.placement import GivenPlacement, Placement
from pyqmigrate.format.device.decode import decode_devices, described_by
from pyqmigrate.format.device.values import Device
from pyqmigrate.format.stream.writer import SectionKind
from pyqmigrate.io.job import Progress
from pyqmigrate.log import logger
from pyqmigrate.snapshot.base import Block, Snapshot
from pyqmigrate.snapshot.sequential import SequentialSnapshot

__all__ = ["Guest"]

_ACPI_TABLES = "/rom@etc/acpi/tables"
_ACPI_TABLES_MAX = 8 << 20  # QEMU's are 2 MiB at most


_DEVICE_MAX = 1 << 20  # bytes; what tells of memory and CPUs is shorter, a card's pixels are not


@dataclass(frozen=True)
class Guest:
    """``devices`` are those of at most a MiB, none where they cannot be told apart; ``ranges`` are
    those of the guest's address space that show blocks, in order, and ``unplaced`` the blocks that
    none shows."""

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
        """Look; a sequential stream takes its one pass for that. ``description`` is taken instead of
        the snapshot's own.

        Errors as of physical_map; also SnapshotError, and UsageError where a block that has to be
        there is in another file.
        """
        if isinstance(snapshot, SequentialSnapshot):
            snapshot.read_through(progress, pages=True)
        try:
            devices = tuple(
                decode_devices(
                    snapshot.source, described_by(snapshot.stream, description), longest=_DEVICE_MAX
                )
            )
        except NotSupported as error:  # too much of it
            logger.warning("the device state is not looked into: %s", error)
            devices = ()
        blocks: dict[str, Block] = {**snapshot.blocks}
        ranges = physical_map(
            snapshot.machine,
            {name: block.length for name, block in blocks.items()},
            # A file without device state was written by a program of another kind than QEMU.
            devices if _has_devices(snapshot) else None,
            given=given,
            acpi_tables=_acpi_tables(blocks.get(_ACPI_TABLES)),
            max_ram_below_4g=max_ram_below_4g,
        )
        for one in ranges:
            _check(one, blocks[one.block])
        placed = {one.block for one in ranges}
        return cls(devices, ranges, tuple(name for name in blocks if name not in placed))


def _has_devices(snapshot: Snapshot) -> bool:
    return any(section.kind is SectionKind.FULL for section in snapshot.stream.sections)


def _acpi_tables(block: Block | None) -> bytes:
    if block is None or block.external or block.length > _ACPI_TABLES_MAX:
        return b""
    return block.read(0, block.length)


def _check(one: Placement, block: Block) -> None:
    if block.external:
        raise UsageError(
            f"the content of block {block.name!r} is not in this snapshot: convert it to mapped-ram"
            " first, with --memory"
        )
    if one.offset % block.page_size or one.length % block.page_size:
        raise UsageError(
            f"the part of block {one.block!r} at {one.address:#x} is not whole pages of "
            f"{block.page_size} bytes"
        )
