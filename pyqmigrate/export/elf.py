"""Snapshot -> an ELF core file of the guest's physical memory.

    with open_snapshot("/snap/guest.mapped") as snapshot:
        report = write_elf(snapshot, "/analysis/guest.elf")

``readelf``, gdb, drgn, crash and volatility3 read it. There is a PT_LOAD for each range of the
guest's address space that shows RAM, notes with the registers of each CPU, and the VMCOREINFO of a
Linux guest (:mod:`pyqmigrate.format.dump.elf`, :mod:`~pyqmigrate.format.dump.elf_notes`,
:mod:`~pyqmigrate.export.vmcoreinfo`). A block is stored once, however many ranges show parts of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from pyqmigrate.errors import UsageError
from pyqmigrate.export.guest import Guest
from pyqmigrate.export.image import Area, Image, ImageReport, write_image
from pyqmigrate.export.vmcoreinfo import VmcoreinfoSearch
from pyqmigrate.format.address_space.physical_map import processor_of
from pyqmigrate.format.address_space.placement import GivenPlacement, Placement
from pyqmigrate.format.device.cpu import cpu_registers
from pyqmigrate.format.dump.elf import Segment, encode_head, head_length
from pyqmigrate.format.dump.elf_notes import cpu_notes
from pyqmigrate.format.dump.vmcoreinfo import NOTE_MAX
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.job import Progress
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.save.writer import Sparse

__all__ = ["write_elf"]

_ALIGNMENT = 1 << 20  # of blocks in the file: more than any direct I/O needs


def write_elf(
    snapshot: Snapshot,
    target: Target,
    *,
    placements: Sequence[GivenPlacement] | None = None,
    max_ram_below_4g: int | None = None,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    sparse: Sparse | str = Sparse.AUTO,
    byte_order: Literal["little", "big"] | None = None,
    description: bytes | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> ImageReport:
    """Write the guest's memory and registers as an ELF core file, and wait until that is durable.

    placements: where blocks are in the guest's address space, for blocks whose place cannot be
        determined; see :func:`~pyqmigrate.format.address_space.physical_map.parse_placement`.
    max_ram_below_4g: that property of a PC, in bytes, if its device state does not say how RAM is
        split at 4 GiB.
    byte_order: the guest's, in place of the one that the device state shows. Only for a Power guest
        without device state it is a guess (big).
    description: JSON text that describes the device sections, instead of the snapshot's own.
    target, channels, direct_io, sparse, progress: as in :func:`pyqmigrate.api.save`.

    Raises NotSupported if a machine's address space, or the split of RAM at 4 GiB, is not known and
    not given, UsageError, SnapshotError, TargetError, Cancelled. The target is unchanged then.
    """
    if byte_order not in (None, "little", "big"):
        raise UsageError(f"byte_order must be 'little' or 'big', not {byte_order!r}")
    guest = Guest.of(snapshot, placements or (), progress, max_ram_below_4g, description)
    processor = processor_of(snapshot.machine, snapshot.blocks, guest.devices)
    cpus = [cpu for cpu in cpu_registers(guest.devices) if cpu.architecture in processor.described]
    notes = b"".join(cpu_notes(cpus, guest.devices))
    offset = head_length(len(guest.ranges), len(notes) + NOTE_MAX)
    areas = {}
    for name, start, end in _spans(guest.ranges):
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        areas[name] = Area(snapshot.blocks[name], start, end - start, offset)
        offset += end - start
    big_endian = processor.big_endian if byte_order is None else byte_order == "big"
    search = VmcoreinfoSearch(snapshot, big_endian=big_endian)
    segments = [_segment(placement, areas[placement.block]) for placement in guest.ranges]

    def head() -> bytes:
        return encode_head(processor.elf, segments, notes + search.note(), big_endian=big_endian)

    return write_image(
        snapshot,
        target,
        guest,
        Image([*areas.values()], offset, lambda: [(0, head())], watch=search.watched),
        cpus=len(cpus),
        channels=channels,
        direct_io=direct_io,
        sparse=sparse,
        progress=progress,
    )


def _spans(ranges: Sequence[Placement]) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each block, and the first and the end of the bytes that ranges show."""
    spans: dict[str, tuple[int, int]] = {}
    for shown in ranges:
        start, end = spans.get(shown.block, (shown.offset, 0))
        spans[shown.block] = min(start, shown.offset), max(end, shown.offset + shown.length)
    for name, (start, end) in spans.items():
        yield name, start, end


def _segment(shown: Placement, area: Area) -> Segment:
    return Segment(shown.address, area.position + shown.offset - area.offset, shown.length)
