"""Stretches: parts of RAM blocks, in the order of their guest-physical addresses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pyqmigrate.argument_types import check
from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.address_space.placement import Placement
from pyqmigrate.snapshot.base import Block, Snapshot
from pyqmigrate.snapshot.load.memories import check_known

__all__ = ["Stretch", "stretches"]


@dataclass(frozen=True)
class Stretch:
    """Bytes ``[start, end)`` of a block, which are at ``address`` on; None: that is not known."""

    block: Block
    start: int
    end: int
    address: int | None

    def address_of(self, offset: int) -> int | None:
        """Return the guest-physical address of a byte of the block that is in here."""
        return None if self.address is None else self.address + offset - self.start

    def clipped(self, first: int, end: int) -> Stretch | None:
        """Return the part at addresses ``[first, end)``, if there is any."""
        if self.address is None:
            return None
        start = max(self.start, self.start + first - self.address)
        stop = min(self.end, self.start + end - self.address)
        if start >= stop:
            return None
        return Stretch(self.block, start, stop, self.address_of(start))


def stretches(
    snapshot: Snapshot,
    placed: Sequence[Placement],
    block: str | None = None,
    addresses: tuple[int, int] | None = None,
) -> list[Stretch]:
    """Return every byte of every block once, at its lowest address; without an address last, in the
    order of the stream.

    block: the name of the only block. addresses: the first and the end of those that count.
    Blocks whose content is in another file are left out, unless ``block`` names one.

    Raises BlockMismatch for an unknown block, UsageError for one without content, and for addresses
    without memory, NotSupported for addresses if none are known.
    """
    check("block", block, str, type(None))
    if block is not None:
        check_known([block], snapshot.blocks)
        if snapshot.blocks[block].external:
            raise UsageError(f"the content of block {block!r} is not in this snapshot")
    found = [
        stretch
        for name, wanted in snapshot.blocks.items()
        if (block is None or name == block) and not wanted.external
        for stretch in _of_block(wanted, placed)
    ]
    found.sort(key=lambda stretch: (stretch.address is None, stretch.address or 0))
    if addresses is None:
        return found
    first, end = _checked(addresses)
    if all(stretch.address is None for stretch in found):
        raise NotSupported("the guest-physical addresses of this snapshot's memory are not known")
    clipped = [part for stretch in found if (part := stretch.clipped(first, end)) is not None]
    if not clipped:
        raise UsageError(f"there is no memory at the addresses {first:#x} to {end:#x}")
    return clipped


def _checked(addresses: tuple[int, int]) -> tuple[int, int]:
    first, end = addresses
    check("the first address", first, int)
    check("the end of the addresses", end, int)
    if not 0 <= first < end:
        raise UsageError(f"addresses {first:#x} to {end:#x} are not a range")
    return first, end


def _of_block(block: Block, placed: Sequence[Placement]) -> list[Stretch]:
    ours = [place for place in placed if place.block == block.name]
    cuts = {0, block.length}
    for place in ours:
        cuts |= {min(place.offset, block.length), min(place.offset + place.length, block.length)}
    found: list[Stretch] = []
    for start, end in itertools.pairwise(sorted(cuts)):
        addresses = [
            place.address + start - place.offset
            for place in ours
            if place.offset <= start < place.offset + place.length
        ]
        address = min(addresses, default=None)
        last = found[-1] if found else None
        if last is not None and address == last.address_of(start):
            found[-1] = Stretch(block, last.start, end, last.address)
        else:
            found.append(Stretch(block, start, end, address))
    return found
