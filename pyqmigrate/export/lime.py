"""Snapshot -> a LiME file of the guest's physical memory.

    with open_snapshot("/snap/guest.mapped") as snapshot:
        report = write_lime(snapshot, "/analysis/guest.lime")

Each range of the guest's address space that shows RAM, in order of address
(:mod:`pyqmigrate.format.dump.lime`). The format does not allow alignment, so it is written through
the page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import UsageError
from pyqmigrate.export.guest import Guest
from pyqmigrate.export.image import Area, Image, ImageReport, write_image
from pyqmigrate.format.address_space.placement import GivenPlacement
from pyqmigrate.format.dump.lime import HEADER_LENGTH, encode_header
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.job import Progress
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.save.writer import Sparse

__all__ = ["write_lime"]

_UNALIGNED = "the format stores memory at unaligned positions"


def write_lime(
    snapshot: Snapshot,
    target: Target,
    *,
    placements: Sequence[GivenPlacement] | None = None,
    max_ram_below_4g: int | None = None,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    sparse: Sparse | str = Sparse.AUTO,
    description: bytes | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> ImageReport:
    """Write the guest's memory as a LiME file, and wait until that is durable.

    Arguments and errors are those of :func:`~pyqmigrate.export.elf.write_elf`; ``direct_io="on"`` is
    a UsageError.
    """
    if parse_enum(DirectIO, direct_io, "direct_io") is DirectIO.ON:
        raise UsageError(f"direct I/O cannot write a LiME file: {_UNALIGNED}")
    guest = Guest.of(snapshot, placements or (), progress, max_ram_below_4g, description)
    headers, areas, offset = [], [], 0
    for shown in guest.ranges:
        headers.append((offset, encode_header(shown.address, shown.length)))
        offset += HEADER_LENGTH
        areas.append(Area(snapshot.blocks[shown.block], shown.offset, shown.length, offset))
        offset += shown.length
    return write_image(
        snapshot,
        target,
        guest,
        Image(areas, offset, lambda: headers, _UNALIGNED),
        cpus=0,
        channels=channels,
        direct_io=DirectIO.OFF,
        sparse=sparse,
        progress=progress,
    )
