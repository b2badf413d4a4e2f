"""The guest's memory by guest-physical address.

with open_snapshot("/snap/guest.mapped") as snapshot:
    memory = PhysicalMemory(snapshot)
    print(memory.read(0x1000000, 16).hex(" "))
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

from pyqmigrate.argument_types import check
from pyqmigrate.errors import UsageError
from pyqmigrate.export.guest import Guest
from pyqmigrate.format.address_space.placement import Placement
from pyqmigrate.io.job import Progress
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["PhysicalMemory"]


class PhysicalMemory:
    """What an open snapshot shows at guest-physical addresses, as the ELF export has it.

    ``ranges`` are those with memory, in order. Raises NotSupported if they are not known,
    SnapshotError, TargetError, UsageError.
    """

    def __init__(
        self, snapshot: Snapshot, progress: Callable[[Progress], object] | None = None
    ) -> None:
        self._snapshot = snapshot
        self.ranges: tuple[Placement, ...] = Guest.of(snapshot, (), progress).ranges
        self._starts = [place.address for place in self.ranges]

    def find(self, address: int) -> Placement | None:
        """Return the range with this address, or None."""
        number = bisect.bisect_right(self._starts, address) - 1
        if number < 0 or address >= self.ranges[number].end:
            return None
        return self.ranges[number]

    def read(self, address: int, length: int) -> bytes:
        """Return bytes from a guest-physical address on, across adjacent ranges.

        Raises UsageError if there is no memory at one of the addresses, and as ``Block.read`` does.
        """
        check("address", address, int)
        check("length", length, int)
        if address < 0 or length < 0:
            raise UsageError(f"{length} bytes at address {address} cannot be read")
        parts: list[bytes] = []
        end = address + length
        while address < end:
            place = self.find(address)
            if place is None:
                raise UsageError(f"the guest has no memory at address {address:#x}")
            stop = min(end, place.end)
            block = self._snapshot.blocks[place.block]
            parts.append(block.read(place.offset + address - place.address, stop - address))
            address = stop
        return b"".join(parts)
