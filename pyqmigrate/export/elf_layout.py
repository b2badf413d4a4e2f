"""The layout of a snapshot as an ELF core: where its blocks are in the file, and the head before them.

Shared by the export (:mod:`pyqmigrate.export.elf`), which writes the file, and the view
(:mod:`pyqmigrate.export.elf_view`), which shows it without writing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pyqmigrate.errors import UsageError
from pyqmigrate.export.guest import Guest
from pyqmigrate.export.image import Area
from pyqmigrate.format.address_space.physical_map import processor_of
from pyqmigrate.format.address_space.placement import GivenPlacement, Placement
from pyqmigrate.format.device.cpu import cpu_registers
from pyqmigrate.format.dump.elf import Segment, encode_head, head_length
from pyqmigrate.format.dump.elf_notes import cpu_notes
from pyqmigrate.format.dump.vmcoreinfo import NOTE_MAX
from pyqmigrate.io.job import Progress
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["ElfLayout"]

_ALIGNMENT = 1 << 20  # of blocks in the file: more than any direct I/O needs


@dataclass(frozen=True)
class ElfLayout:
    """``machine`` is the processor's number in ELF files; ``areas`` are the parts of blocks, by position;
    ``notes`` those of ``cpus`` CPUs; ``length`` that of the file in bytes."""

    guest: Guest
    machine: int
    big_endian: bool
    areas: tuple[Area, ...]
    segments: tuple[Segment, ...]
    notes: bytes
    cpus: int
    length: int

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        *,
        placements: Sequence[GivenPlacement] | None = None,
        max_ram_below_4g: int | None = None,
        byte_order: Literal["little", "big"] | None = None,
        description: bytes | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> ElfLayout:
        """Lay out the memory of a snapshot. Arguments and errors are those of
        :func:`~pyqmigrate.export.elf.write_elf`."""
        if byte_order not in (None, "little", "big"):
            raise UsageError(f"byte_order must be 'little' or 'big', not {byte_order!r}")
        guest = Guest.of(snapshot, placements or (), progress, max_ram_below_4g, description)
        processor = processor_of(snapshot.machine, snapshot.blocks, guest.devices)
        cpus = [c for c in cpu_registers(guest.devices) if c.architecture in processor.described]
        notes = b"".join(cpu_notes(cpus, guest.devices))
        offset = head_length(len(guest.ranges), len(notes) + NOTE_MAX)
        areas = {}
        for name, start, end in _spans(guest.ranges):
            offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
            areas[name] = Area(snapshot.blocks[name], start, end - start, offset)
            offset += end - start
        return cls(
            guest,
            processor.elf,
            processor.big_endian if byte_order is None else byte_order == "big",
            tuple(areas.values()),
            tuple(_segment(placement, areas[placement.block]) for placement in guest.ranges),
            notes,
            len(cpus),
            offset,
        )

    def head(self, vmcoreinfo: bytes = b"") -> bytes:
        """Return the bytes before the memory; ``vmcoreinfo`` is that note, whole, or empty."""
        return encode_head(
            self.machine, self.segments, self.notes + vmcoreinfo, big_endian=self.big_endian
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
