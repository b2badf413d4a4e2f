"""Seal a finished snapshot.

    seal("/snap/guest.mapped")                       # writes /snap/guest.mapped.seal

:mod:`pyqmigrate.format.seal` describes a seal. It covers every byte of the file; it does not
authenticate the writer. :mod:`pyqmigrate.integrity.verify` compares a file with its seal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import (
    NotSupported,
    PyqmigrateError,
    SnapshotError,
    TargetError,
    UsageError,
    target_error,
)
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.seal import SEALED_MAX, SealLine
from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder
from pyqmigrate.integrity.digests import Digests, open_direct
from pyqmigrate.integrity.manifest import Manifest, check_place, remove_manifest, write_manifest
from pyqmigrate.io.bitmap_order import other_order
from pyqmigrate.io.channels import Channels, check_channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.in_use import files_in_use, refuse_in_use
from pyqmigrate.io.increments_of import increments_of, refuse_base
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.lock import lock_file
from pyqmigrate.io.place import resolve_symlink, seal_path
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import snapshot_of
from pyqmigrate.snapshot.mapped_ram import check_bitmap_order
from pyqmigrate.snapshot.stale import clear_stale, find_stale

__all__ = ["SealReport", "seal", "stale_pages", "start_seal"]

Named: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class SealReport:
    """What sealing did.

    ``size`` of the file and ``bytes_read`` of it, in bytes; ``cleared_pages`` had old bytes under
    clear bits and are holes now; ``clear_pages_zero`` is False for a stream without bitmaps.
    ``direct_io`` says whether the file was read past the page cache, ``direct_io_reason`` why.
    ``bitmap_order`` is the byte order of the bitmaps; None for a stream without them.
    """

    snapshot: str
    seal: str
    algorithm: Algorithm
    size: int
    bytes_read: int
    clear_pages_zero: bool
    cleared_pages: int
    seconds: float
    direct_io: bool
    direct_io_reason: str
    channels: int
    bitmap_order: ByteOrder | None


def seal(
    snapshot: Named,
    *,
    algorithm: Algorithm | str = Algorithm.XXH3_128,
    offset: int | None = None,
    page_size: int | None = None,
    bitmap_order: ByteOrder | None = None,
    channels: int = 4,
    direct_io: DirectIO | str = DirectIO.AUTO,
    progress: Callable[[Progress], object] | None = None,
) -> SealReport:
    """Make a finished snapshot durable and verifiable, and wait. See :func:`start_seal`."""
    check_callback("progress", progress)
    return start_seal(
        snapshot,
        algorithm=algorithm,
        offset=offset,
        page_size=page_size,
        bitmap_order=bitmap_order,
        channels=channels,
        direct_io=direct_io,
    ).wait(progress)


def start_seal(
    snapshot: Named,
    *,
    algorithm: Algorithm | str = Algorithm.XXH3_128,
    offset: int | None = None,
    page_size: int | None = None,
    bitmap_order: ByteOrder | None = None,
    channels: int = 4,
    direct_io: DirectIO | str = DirectIO.AUTO,
) -> Job[SealReport]:
    """Start to seal a snapshot of any kind; return at once.

    Its structure is verified; pages whose bit is clear and that do not read as zeros become holes;
    it is made durable; the seal gets its name beside it when it is complete and durable. An older
    seal is replaced; another file of that name is a UsageError before anything is changed.

    snapshot: a path or a ``file:`` URI. offset, page_size, bitmap_order: as for
        :func:`~pyqmigrate.snapshot.detect.open_snapshot`. The wrong bitmap_order would clear pages
        with data. If it is not given, and the other one would clear fewer pages, that is a
        UsageError, and nothing is changed.
    channels: threads that read, 1 to 255. direct_io: whether to read past the page cache; ``auto``:
        unless the file is in it.

    The job's result raises SnapshotError for a file that is not a complete snapshot, TargetError when
    the system refuses (with errno EBUSY if another process writes the file, if the file changes
    during the work, and if pages need clearing while a guest runs from it), NotSupported, Cancelled.
    """
    if isinstance(snapshot, Descriptors):
        raise UsageError("a seal is written beside a path; descriptors have none")
    chosen = parse_enum(Algorithm, algorithm, "algorithm")
    setting = parse_enum(DirectIO, direct_io, "direct_io")
    count = check_channels(channels)
    check("offset", offset, int, type(None))
    check("page_size", page_size, int, type(None))
    check_bitmap_order(bitmap_order)
    source = InputFile(snapshot)
    try:
        if source.view is not None:
            raise UsageError(
                f"{source.name!r} is shown from a store or a compact file, and cannot be sealed here: "
                "a snapshot of a store has its seal, and a compact file gets the seal of the snapshot "
                "that it is made of"
            )
        if offset is not None and source.offset:
            raise UsageError("the offset is given twice")
        if source.is_device:
            raise UsageError(
                f"{source.name!r} is a block device, which records no time of change: seal a file"
            )
        place = check_place(seal_path(source.name))
        refuse_in_use(place, files_in_use([(source.fd, "the snapshot that is to be sealed")]))
        work = _Sealing(
            source,
            place,
            offset or None,
            page_size,
            bitmap_order,
            Digests(chosen),
            Channels(count, "pyqmigrate-seal"),
            setting,
        )
        return Job(work.channels, source.size, work.run)
    except BaseException:
        source.close()
        raise


@dataclass(frozen=True)
class _Sealing:
    source: InputFile
    place: Path
    offset: int | None
    page_size: int | None
    bitmap_order: ByteOrder | None
    digests: Digests
    channels: Channels
    direct_io: DirectIO

    def run(self) -> SealReport:
        try:
            with self._refusing():
                return self._run(time.monotonic())
        finally:
            self.source.close()

    def _run(self, started: float) -> SealReport:
        source = self.source
        if source.size > SEALED_MAX:
            raise NotSupported(f"a file of {source.size} bytes cannot be sealed")
        self._lock("another process writes it in place")
        with contextlib.closing(StreamFile.find(source, self.offset)) as stream_file:
            return self._seal(stream_file, started)

    def _seal(self, stream_file: StreamFile, started: float) -> SealReport:
        source, digests = self.source, self.digests
        before = os.fstat(source.fd)
        cleared, start, blocks, order = self._prepare(stream_file, before)
        os.fsync(source.fd)
        if cleared:
            before = os.fstat(source.fd)
        digests.resize(before.st_size)
        direct, reason = open_direct(source, self.direct_io)
        try:
            digests.read_rest(source.fd, source.name, self.channels, direct)
        finally:
            source.close_direct(direct)
        self._check_unchanged(before)
        manifest = digests.seal(
            before.st_mtime_ns,
            start,
            blocks or (),
            clear_pages_zero=blocks is not None,
            bitmap_order=order or "little",
        )
        self._check_increments(manifest)
        write_manifest(self.place, manifest)
        return SealReport(
            source.name,
            str(self.place),
            digests.algorithm,
            before.st_size,
            digests.bytes_read,
            blocks is not None,
            cleared,
            time.monotonic() - started,
            direct is not None,
            reason,
            self.channels.count,
            order,
        )

    @property
    def _file(self) -> Path:
        """The file that is sealed: the seal is beside it, not beside a link to it."""
        return resolve_symlink(self.source.name)

    def _check_increments(self, manifest: Manifest) -> None:
        """Refuse another seal for a base whose increments know it by the seal that it has."""
        digest = SealLine.decode(manifest.head.encode(manifest.digests)).digest
        for path, header in increments_of(self._file):
            if header.base.seal not in (None, digest):
                raise UsageError(
                    f"{self.source.name!r} is the base of {path.name!r}, which knows it by its seal: "
                    "it cannot get another one. Keep the seal, or first convert the increment to "
                    "mapped-ram"
                )

    def _prepare(
        self, stream_file: StreamFile, before: os.stat_result
    ) -> tuple[int, int, tuple[BlockLayout, ...] | None, ByteOrder | None]:
        """Verify the structure and clear stale pages. Return how many, where the stream starts, the
        blocks, and the byte order of their bitmaps."""
        shared = stream_file.share()
        if shared.increment is not None:
            shared = shared.without_header()  # the seal is of this file, whatever its base is
        with snapshot_of(
            shared, page_size=self.page_size, bitmap_order=self.bitmap_order
        ) as snapshot:
            snapshot.verify()
            order = snapshot.bitmap_order
            if order is None:
                return 0, snapshot.offset, None, None
            if snapshot.stream.background:
                raise NotSupported(
                    "a background snapshot without bitmaps cannot be sealed: convert it to "
                    "mapped-ram first"
                )
            channels = self.channels.sibling("pyqmigrate-stale")
            stale = find_stale(snapshot, channels)
            if stale:
                self._check_unchanged(before)
                if self.bitmap_order is None:
                    self._check_order(snapshot, order, sum(stale.values()))
                self._clear(snapshot, stale, before, channels)
            return sum(stale.values()), snapshot.offset, snapshot.layouts, order

    def _check_order(self, snapshot: Snapshot, order: ByteOrder, stale: int) -> None:
        """Check that the bitmaps are not in the other byte order, where clear pages have data.

        In the right order each page that a bit is set for has data, which the bit covers; no other
        order of equally many bits in each 64 pages covers more.
        """
        other = other_order(order)
        with snapshot_of(snapshot.stream_file.share(), bitmap_order=other) as swapped:
            try:
                swapped.verify()
            except SnapshotError:
                return
            fewer = sum(find_stale(swapped, self.channels.sibling("pyqmigrate-stale")).values())
        if fewer < stale:
            raise UsageError(
                f"the host that wrote this file may have been {other}-endian: {stale} pages have "
                f"bytes under clear bits, and only {fewer} in that byte order. Clearing them could "
                f"destroy the guest's memory: give bitmap_order, --bitmap-order {other} or {order}"
            )

    def _clear(
        self, snapshot: Snapshot, stale: dict[str, int], before: os.stat_result, channels: Channels
    ) -> None:
        """Make the pages holes. The file must be the one ``before`` its bitmaps were read: a writer
        that takes no lock, such as QEMU, may have replaced its content since, and the old bitmaps
        would clear pages of the new snapshot."""
        refuse_base(self._file, change="changed, because pages have to be cleared in it")
        self._lock("a guest runs from it, and pages have to be cleared in it", exclusive=True)
        self._check_unchanged(before)
        # An earlier seal would report this change as damage.
        remove_manifest(self.place)
        fd = os.open(f"/proc/self/fd/{self.source.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._check_unchanged(before)  # the fsync of the directory took time
            clear_stale(snapshot, fd, stale, channels)
        finally:
            os.close(fd)
        if os.fstat(self.source.fd).st_size != before.st_size:
            raise TargetError(
                errno.EBUSY,
                "was written to while pages were cleared in it, and may be damaged",
                self.source.name,
            )

    def _lock(self, why: str, *, exclusive: bool = False) -> None:
        try:
            lock_file(self.source.fd, exclusive=exclusive)
        except BlockingIOError as error:
            raise TargetError(
                errno.EBUSY, f"cannot be sealed now: {why}", self.source.name
            ) from error

    def _check_unchanged(self, before: os.stat_result) -> None:
        """Check that the name still leads to the file, and that the file has not changed."""
        assert self.source.place is not None
        now, named = os.fstat(self.source.fd), self.source.place.stat()
        same = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if not same or not os.path.samestat(now, named):
            raise TargetError(
                errno.EBUSY, "was changed or replaced while it was being sealed", self.source.name
            )

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except PyqmigrateError:
            raise
        except OSError as error:
            raise target_error(error, "cannot be sealed", self.source.name) from error


def stale_pages(snapshot: Snapshot, *, channels: int = 2) -> dict[str, int]:
    """Return how many pages of each block have a clear bit and do not read as zeros in the file.

    A guest sees zeros in them. Blocks without such pages are left out. Raises SnapshotError for bad
    bitmaps, TargetError.
    """
    return find_stale(snapshot, Channels(check_channels(channels), "pyqmigrate-stale"))
