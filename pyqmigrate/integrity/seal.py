"""Seal a finished snapshot, and verify one that was sealed.

    seal("/snap/guest.mapped")                       # writes /snap/guest.mapped.seal
    check = verify_seal("/snap/guest.mapped")        # None: it has no seal
    for damage in check.damages:
        print(damage)

:mod:`pyqmigrate.format.seal` describes a seal. It covers every byte of the file; it does not
authenticate the writer.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import (
    Cancelled,
    NotSupported,
    PyqmigrateError,
    SnapshotError,
    TargetError,
    UsageError,
    target_error,
)
from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm
from pyqmigrate.format.seal import PIECE, SEALED_MAX, count_pieces
from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder
from pyqmigrate.integrity.damage import Damage, parts_of
from pyqmigrate.integrity.digests import Digests, open_direct
from pyqmigrate.integrity.manifest import (
    Manifest,
    check_place,
    read_manifest,
    remove_manifest,
    write_manifest,
)
from pyqmigrate.integrity.stream_damage import parts_of_stream
from pyqmigrate.io.bitmap_order import other_order
from pyqmigrate.io.channels import Channels, check_channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.in_use import files_in_use, refuse_in_use
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.lock import lock_file
from pyqmigrate.io.place import seal_path
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import snapshot_of
from pyqmigrate.snapshot.mapped_ram import check_bitmap_order
from pyqmigrate.snapshot.sequential import SequentialSnapshot
from pyqmigrate.snapshot.stale import clear_stale, find_stale

__all__ = [
    "SealCheck",
    "SealReport",
    "current_seal",
    "seal",
    "stale_pages",
    "start_seal",
    "start_verify",
    "verify_seal",
]

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


@dataclass(frozen=True)
class SealCheck:
    """The comparison of a file with its seal. ``notes`` are sentences for the user."""

    seal: str
    algorithm: Algorithm
    size: int
    damages: tuple[Damage, ...]
    notes: tuple[str, ...]
    clear_pages_zero: bool
    bytes_read: int
    seconds: float
    direct_io: bool
    direct_io_reason: str

    @property
    def intact(self) -> bool:
        return not self.damages

    def to_json(self) -> dict[str, Any]:
        """Return values for JSON."""
        return {
            "path": self.seal,
            "algorithm": str(self.algorithm),
            "sealed_size": self.size,
            "intact": self.intact,
            "damages": [damage.to_json() for damage in self.damages],
            "notes": [*self.notes],
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "direct_io": self.direct_io,
            "direct_io_reason": self.direct_io_reason,
        }

    def raise_if_damaged(self) -> None:
        """Raise SnapshotError for the first damage; it says how many there are."""
        if self.damages:
            first = self.damages[0]
            more = f", and {len(self.damages) - 1} more" if len(self.damages) > 1 else ""
            raise SnapshotError(
                f"the file is not what was sealed: {first}{more}",
                offset=first.offset,
                block=first.block,
            )


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
    chosen, setting = parse_enum(Algorithm, algorithm, "algorithm"), _setting(direct_io)
    count = check_channels(channels)
    check("offset", offset, int, type(None))
    check("page_size", page_size, int, type(None))
    check_bitmap_order(bitmap_order)
    source = InputFile(snapshot)
    try:
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


def _setting(direct_io: DirectIO | str) -> DirectIO:
    return parse_enum(DirectIO, direct_io, "direct_io")


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

    def _prepare(
        self, stream_file: StreamFile, before: os.stat_result
    ) -> tuple[int, int, tuple[BlockLayout, ...] | None, ByteOrder | None]:
        """Verify the structure and clear stale pages. Return how many, where the stream starts, the
        blocks, and the byte order of their bitmaps."""
        with snapshot_of(
            stream_file.share(), page_size=self.page_size, bitmap_order=self.bitmap_order
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


def current_seal(path: Named, fd: int | None = None) -> Manifest | None:
    """Return the seal beside ``path`` if it is intact and the file was not modified since.

    That is: the file, ``fd`` if given, has the size and the time of modification that it was sealed
    with. The file is not read. None in all other cases.
    """
    try:
        info = os.stat(path) if fd is None else os.fstat(fd)  # noqa: PTH116
        return read_manifest(
            seal_path(path),
            wanted=lambda head: (head.size, head.mtime_ns) == (info.st_size, info.st_mtime_ns),
        )
    except (PyqmigrateError, OSError, ValueError):
        return None


def verify_seal(
    snapshot: Named,
    *,
    page_size: int | None = None,
    channels: int = 4,
    direct_io: DirectIO | str = DirectIO.AUTO,
    progress: Callable[[Progress], object] | None = None,
) -> SealCheck | None:
    """Compare a file with its seal, and wait; None if it has none. See :func:`start_verify`."""
    check_callback("progress", progress)
    job = start_verify(snapshot, page_size=page_size, channels=channels, direct_io=direct_io)
    return None if job is None else job.wait(progress)


def start_verify(
    snapshot: Named,
    *,
    page_size: int | None = None,
    channels: int = 4,
    direct_io: DirectIO | str = DirectIO.AUTO,
) -> Job[SealCheck] | None:
    """Start to compare every byte of a file with its seal; return None if it has none.

    The file is not parsed, so damage is located also in a file that cannot be parsed any more; but
    the pages of a damaged sequential stream are found by its records, as far as these still parse.
    Arguments are those of :func:`start_seal`. Raises SnapshotError (its ``field`` is ``seal``) for
    a damaged seal, NotSupported if the library for its digests is missing, UsageError, TargetError;
    the job's result TargetError, SnapshotError if the file becomes shorter during the work,
    Cancelled.
    """
    if isinstance(snapshot, Descriptors):
        raise UsageError("a seal is written beside a path; descriptors have none")
    count, setting = check_channels(channels), _setting(direct_io)
    check("page_size", page_size, int, type(None))
    source = InputFile(snapshot)
    try:
        path = seal_path(source.name)
        # Digests of pieces that the file does not have are not needed to report them missing.
        manifest = read_manifest(path, count_pieces(source.size) * DIGEST_SIZE)
        if manifest is None:
            source.close()
            return None
        work = _Checking(
            source, path, manifest, page_size, Channels(count, "pyqmigrate-verify"), setting
        )
        return Job(work.channels, min(source.size, manifest.size), work.run)
    except BaseException:
        source.close()
        raise


@dataclass(frozen=True)
class _Checking:
    source: InputFile
    path: Path
    manifest: Manifest
    page_size: int | None
    channels: Channels
    direct_io: DirectIO

    def run(self) -> SealCheck:
        try:
            return self._run(time.monotonic())
        finally:
            self.source.close()

    def _run(self, started: float) -> SealCheck:
        source, manifest = self.source, self.manifest
        info = os.fstat(source.fd)
        digests = Digests(manifest.algorithm)
        digests.resize(min(info.st_size, manifest.size))
        direct, reason = open_direct(source, self.direct_io)
        try:
            digests.read_rest(source.fd, source.name, self.channels, direct)
        finally:
            source.close_direct(direct)
        damages = tuple(self._damages(digests, info.st_size))
        notes = []
        head = manifest.head
        if damages and not head.blocks and not head.clear_pages_zero:
            damages, note = self._in_stream(damages)
            notes.append(note)
        if damages and info.st_mtime_ns != manifest.head.mtime_ns:
            notes.append(
                "the file was modified after it was sealed; if that was intended, or another "
                "snapshot has its name now, seal it again"
            )
        elif info.st_mtime_ns != manifest.head.mtime_ns:
            notes.append("the file has another time of modification than when it was sealed")
        return SealCheck(
            str(self.path),
            manifest.algorithm,
            manifest.size,
            damages,
            tuple(notes),
            manifest.clear_pages_zero,
            digests.bytes_read,
            time.monotonic() - started,
            direct is not None,
            reason,
        )

    def _in_stream(self, damages: tuple[Damage, ...]) -> tuple[tuple[Damage, ...], str]:
        """Return the damages with the pages of a sequential stream, if its records parse; and a
        note."""
        offset = self.manifest.head.offset or None

        def poll(_: Progress) -> None:
            if self.channels.cancelled:
                raise Cancelled("cancelled")

        try:
            stream_file = StreamFile.find(self.source, offset)
            with SequentialSnapshot(stream_file, page_size=self.page_size) as snapshot:
                snapshot.prepare_random_reads(poll)
                found = tuple(
                    replace(
                        damage,
                        parts=tuple(
                            parts_of_stream(snapshot, damage.offset, damage.offset + damage.length)
                        ),
                    )
                    for damage in damages
                )
        except (SnapshotError, NotSupported) as error:
            return damages, (
                "the affected pages of the guest are not known: the stream does not parse any more "
                f"({error})"
            )
        return found, (
            "the affected pages were found by the records of the stream as they are now; if a "
            "record itself was damaged, other pages may be affected too"
        )

    def _damages(self, digests: Digests, size: int) -> Iterator[Damage]:
        sealed = self.manifest.size
        bad = [*digests.differing(self.manifest.digests)]
        if size < sealed and size % PIECE and (not bad or bad[-1] != size // PIECE):
            bad.append(size // PIECE)
        wrong = set(bad)

        def intact(start: int, end: int) -> bool:
            pieces = range(start // PIECE, count_pieces(end))
            return end <= min(size, sealed) and wrong.isdisjoint(pieces)

        def parts(start: int, end: int) -> tuple[Any, ...]:
            return tuple(parts_of(self.manifest.head, start, end, intact, self.source.fd))

        for first, last in _stretches(bad):
            start, end = first * PIECE, min((last + 1) * PIECE, size, sealed)
            yield Damage(start, end - start, "not what was sealed", parts(start, end))
        if size < sealed:
            yield Damage(
                size,
                sealed - size,
                f"missing: the file had {sealed} bytes and has {size}",
                parts(size, sealed),
            )
        if size > sealed:
            yield Damage(
                sealed, size - sealed, f"added: the file had {sealed} bytes and has {size}"
            )


def _stretches(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield ``(first, last)`` of each run of consecutive numbers."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        yield members[0], members[-1]
