"""Write files that contain guest memory by address: the common part of ELF cores and LiME files.

Such a file has a header and areas: parts of RAM blocks at positions that the format determines. All
channels write their pages, with direct I/O where an area's position allows it; zero pages become
holes. The file gets its name when it is complete and durable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pyqmigrate.core import File
from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import Cancelled, GuestMemoryError, NoSpace, UsageError
from pyqmigrate.export.guest import Guest
from pyqmigrate.format.address_space.placement import Placement
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, check_channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.memory import OpenMemory, SnapshotMemory
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.pages import BlockPages, count_pages, write_pages
from pyqmigrate.io.target import Target
from pyqmigrate.log import logger
from pyqmigrate.snapshot.base import Block, Snapshot, error_from_errno
from pyqmigrate.snapshot.save.writer import Sparse

__all__ = ["Area", "Image", "ImageReport", "write_image"]

_MAGIC_LENGTH = 4


@dataclass(frozen=True)
class Area:
    """Bytes ``[offset, offset + length)`` of a block, whole pages, at ``position`` in the file."""

    block: Block
    offset: int
    length: int
    position: int


@dataclass(frozen=True)
class Image:
    """The content of a file of ``length`` bytes.

    ``pieces`` is called after the areas are written. It returns the other bytes with their
    positions; the first piece is at 0 and longer than a magic. ``direct_io_reason`` says why direct
    I/O cannot write the file, if that is so. ``watch`` replaces the memory of a block by the one to
    read from.
    """

    areas: Sequence[Area]
    length: int
    pieces: Callable[[], Sequence[tuple[int, bytes]]]
    direct_io_reason: str = ""
    watch: Callable[[Block, SnapshotMemory], SnapshotMemory] | None = None


@dataclass(frozen=True)
class ImageReport:
    """What an export did.

    ``ranges`` of the guest's address space are in the file, the blocks ``unplaced`` are not;
    ``cpus`` is how many CPUs have notes. The rest is as in :class:`~pyqmigrate.SaveReport`.
    """

    ranges: tuple[Placement, ...]
    unplaced: tuple[str, ...]
    cpus: int
    data_pages: int
    zero_pages: int
    bytes_written: int
    bytes_allocated: int
    file_size: int
    seconds: float
    direct_io: bool
    direct_io_reason: str
    channels: int
    sparse: Sparse


def write_image(
    snapshot: Snapshot,
    target: Target,
    guest: Guest,
    image: Image,
    *,
    cpus: int,
    channels: int,
    direct_io: DirectIO | str,
    sparse: Sparse | str,
    progress: Callable[[Progress], object] | None,
) -> ImageReport:
    """Write and publish ``image``, and wait. Arguments and errors are those of
    :func:`pyqmigrate.save`; also SnapshotError if pages cannot be read."""
    snapshot.refuse_as_target(target)
    writer = _Writer(
        snapshot,
        target,
        image,
        check_channels(channels),
        parse_enum(DirectIO, direct_io, "direct_io"),
        parse_enum(Sparse, sparse, "sparse"),
    )
    try:
        job = Job(writer.channels, sum(area.length for area in image.areas), writer.run)
    except BaseException:
        writer.close()
        raise
    report = replace(job.wait(progress), ranges=guest.ranges, unplaced=guest.unplaced, cpus=cpus)
    logger.info("exported %s: %s", snapshot.source.name, report)
    return report


class _Writer:
    """The export of one image. It owns the files and memories that it opens until :meth:`run` ends."""

    def __init__(
        self,
        snapshot: Snapshot,
        target: Target,
        image: Image,
        channels: int,
        direct_io: DirectIO,
        sparse: Sparse,
    ) -> None:
        self.started = time.monotonic()
        self.snapshot = snapshot
        self.image = image
        self.sparse = sparse
        self.channels = Channels(channels, "pyqmigrate-export")
        with contextlib.ExitStack() as stack:
            self.memories: list[OpenMemory] = []
            self.bitmaps: list[Bitmap] = []
            for area in image.areas:
                memory = area.block.memory()
                if image.watch is not None:
                    memory = image.watch(area.block, memory)
                attached = OpenMemory(
                    area.block.name, memory.part(area.offset, area.length), writable=False
                )
                stack.callback(attached.close)
                self.memories.append(attached)
                bitmap = Bitmap(area.length // area.block.page_size)
                stack.callback(bitmap.close)
                self.bitmaps.append(bitmap)
            self.target = OutputFile.open(target, direct_io, in_use=snapshot.in_use())
            stack.callback(self.target.abort)
            if self.target.offset:
                raise UsageError("ELF and LiME files cannot be written at an offset")
            self._cleanup = stack.pop_all()

    def close(self) -> None:
        self._cleanup.close()

    def run(self) -> ImageReport:
        with self._cleanup:
            self._check_space()
            self.target.set_size(self.image.length)
            with self._snapshot_errors():
                write_pages(
                    self._pages(),
                    File(self.target.fd, self.target.direct),
                    self.sparse.policy(),
                    self.channels,
                    self.target.name,
                )
            pieces = self.image.pieces()
            for position, data in pieces:
                self.target.write_at(position, data if position else _without_magic(data))
                self.channels.core.count_io(len(data))
            self._check_cancelled()
            self.target.publish(pieces[0][1][:_MAGIC_LENGTH], self._check_cancelled)
            return self._report()

    def _check_cancelled(self) -> None:
        if self.channels.cancelled:
            raise Cancelled("cancelled")

    def _check_space(self) -> None:
        """Raise NoSpace before the first page if the data cannot fit; count it only if in doubt."""
        free = self.target.free_bytes()
        dense = self.sparse is Sparse.DENSE
        need = sum(m.length if dense else m.extent_bytes for m in self.memories)
        if free is None or need <= free:
            return
        if not dense:
            with self._snapshot_errors():
                counter = self.channels.sibling("pyqmigrate-count")
                count_pages(self._pages(), counter, self.target.name)
            need = sum(
                bitmap.count() * area.block.page_size
                for bitmap, area in zip(self.bitmaps, self.image.areas, strict=True)
            )
        if need > free:
            raise NoSpace(
                f"the export needs {need >> 20} MiB and {free >> 20} MiB are free", self.target.name
            )

    def _pages(self) -> list[BlockPages]:
        return [
            BlockPages(
                BlockLayout(
                    area.block.name, area.length, area.block.page_size, 0, 0, area.position
                ),
                bitmap,
                memory,
            )
            for area, bitmap, memory in zip(
                self.image.areas, self.bitmaps, self.memories, strict=True
            )
        ]

    @contextlib.contextmanager
    def _snapshot_errors(self) -> Iterator[None]:
        """Turn errors of memory, which is the snapshot's file, into errors of the snapshot."""
        try:
            yield
        except GuestMemoryError as error:
            raise error_from_errno(
                error.errno or errno.EIO, self.snapshot.source, error.block or ""
            ) from error

    def _report(self) -> ImageReport:
        totals = self.channels.totals()
        return ImageReport(
            ranges=(),
            unplaced=(),
            cpus=0,
            data_pages=totals.data_pages,
            zero_pages=totals.zero_pages,
            bytes_written=totals.bytes_moved,
            bytes_allocated=self.target.allocated_bytes(),
            file_size=os.fstat(self.target.fd).st_size,
            seconds=time.monotonic() - self.started,
            direct_io=self.target.direct is not None,
            direct_io_reason=self.image.direct_io_reason or self.target.direct_io_reason,
            channels=self.channels.count,
            sparse=self.sparse,
        )


def _without_magic(data: bytes) -> bytes:
    return bytes(_MAGIC_LENGTH) + data[_MAGIC_LENGTH:]
