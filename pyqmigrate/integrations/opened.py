"""A snapshot of any kind as an ELF core for a tool: opened by its name, and read only as the tool reads.

The core has to be a program's memory by address, so the snapshot must be one whose pages can be read in
any order. A compressed stream cannot: what it contains is written into an unnamed file first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pyqmigrate.enums import Format
from pyqmigrate.errors import UsageError
from pyqmigrate.export.convert import convert
from pyqmigrate.export.elf_layout import ElfLayout
from pyqmigrate.export.elf_view import ElfView
from pyqmigrate.export.vmcoreinfo import find_vmcoreinfo
from pyqmigrate.format.address_space.placement import GivenPlacement
from pyqmigrate.io.target import Descriptors
from pyqmigrate.log import logger
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.store.plain_snapshot import unnamed_file

__all__ = ["open_any", "view_of"]


def open_any(
    name: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Snapshot:
    """Open a snapshot of any kind for reads in any order: a path, a ``file:`` URI, ``STORE#NAME``.

    A compressed stream is unpacked into an unnamed file beside it, or among temporary files. The
    caller closes the result. Raises the errors of :func:`pyqmigrate.open_snapshot`; TargetError
    without space.
    """
    snapshot = open_snapshot(os.fspath(name), base=base)
    if not snapshot.source.forward:
        return snapshot
    with snapshot:
        logger.info("%s is compressed, and is unpacked first", snapshot.source.name)
        fd = unnamed_file(None, snapshot.source.place)
        try:
            convert(snapshot, Descriptors(fd), to=Format.MAPPED_RAM)
            return open_snapshot(Descriptors(fd))
        finally:
            os.close(fd)


def view_of(
    snapshot: Snapshot,
    *,
    placements: Sequence[GivenPlacement] | None = None,
    max_ram_below_4g: int | None = None,
    vmcoreinfo: bytes | None = b"",
) -> ElfView:
    """Return the ELF core of an open snapshot.

    placements, max_ram_below_4g: as in :func:`pyqmigrate.convert`.
    vmcoreinfo: that note, whole; empty to do without, None to search the memory for it.

    Raises NotSupported if the guest's address space is not known, UsageError if a block that is
    needed is in another file, SnapshotError, TargetError.
    """
    if vmcoreinfo is not None and not isinstance(vmcoreinfo, bytes):
        raise UsageError(f"vmcoreinfo must be bytes or None, not {type(vmcoreinfo).__name__}")
    layout = ElfLayout.of(snapshot, placements=placements, max_ram_below_4g=max_ram_below_4g)
    if vmcoreinfo is None:
        placed = {area.block.name for area in layout.areas}
        blocks = [block for name, block in snapshot.blocks.items() if name in placed]
        vmcoreinfo = find_vmcoreinfo(snapshot, blocks, big_endian=layout.big_endian)
    return ElfView(snapshot, layout, vmcoreinfo)
