"""Snapshot -> an ELF core file of the guest's physical memory.

    with open_snapshot("/snap/guest.mapped") as snapshot:
        report = write_elf(snapshot, "/analysis/guest.elf")

``readelf``, gdb, drgn, crash and volatility3 read it. There is a PT_LOAD for each range of the
guest's address space that shows RAM, notes with the registers of each CPU, and the VMCOREINFO of a
Linux guest (:mod:`pyqmigrate.format.dump.elf`, :mod:`~pyqmigrate.format.dump.elf_notes`,
:mod:`~pyqmigrate.export.vmcoreinfo`). A block is stored once, however many ranges show parts of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pyqmigrate.export.elf_layout import ElfLayout
from pyqmigrate.export.image import Image, ImageReport, write_image
from pyqmigrate.export.vmcoreinfo import VmcoreinfoSearch
from pyqmigrate.format.address_space.placement import GivenPlacement
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.job import Progress
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.save.writer import Sparse

__all__ = ["write_elf"]


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
    layout = ElfLayout.of(
        snapshot,
        placements=placements,
        max_ram_below_4g=max_ram_below_4g,
        byte_order=byte_order,
        description=description,
        progress=progress,
    )
    search = VmcoreinfoSearch(snapshot, big_endian=layout.big_endian)

    def head() -> bytes:
        return layout.head(search.note())

    return write_image(
        snapshot,
        target,
        layout.guest,
        Image(layout.areas, layout.length, lambda: [(0, head())], watch=search.watched),
        cpus=layout.cpus,
        channels=channels,
        direct_io=direct_io,
        sparse=sparse,
        progress=progress,
    )
