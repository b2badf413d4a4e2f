"""Compare a sealed file with its seal.

    check = verify_seal("/snap/guest.mapped")        # None: it has no seal
    for damage in check.damages:
        print(damage)

:mod:`pyqmigrate.integrity.seal` seals a file, :mod:`pyqmigrate.format.seal` describes a seal.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import (
    Cancelled,
    NotSupported,
    PyqmigrateError,
    SnapshotError,
    TargetError,
    UsageError,
)
from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm
from pyqmigrate.format.seal import PIECE, SUFFIX, count_pieces
from pyqmigrate.integrity.damage import Damage, parts_of
from pyqmigrate.integrity.digests import Digests, open_direct
from pyqmigrate.integrity.manifest import Manifest, read_manifest
from pyqmigrate.integrity.stream_damage import parts_of_stream
from pyqmigrate.io.channels import Channels, check_channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.place import seal_path
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.sequential import SequentialSnapshot

__all__ = ["SealCheck", "current_seal", "start_verify", "verify_plain", "verify_seal"]


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


def verify_seal(
    snapshot: str | os.PathLike[str],
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
    snapshot: str | os.PathLike[str],
    *,
    page_size: int | None = None,
    channels: int = 4,
    direct_io: DirectIO | str = DirectIO.AUTO,
) -> Job[SealCheck] | None:
    """Start to compare every byte of a file with its seal; return None if it has none.

    The file is not parsed, so damage is located also in a file that cannot be parsed any more; but
    the pages of a damaged sequential stream are found by its records, as far as these still parse.
    Arguments are those of :func:`~pyqmigrate.integrity.seal.start_seal`.

    Raises SnapshotError (its ``field`` is ``seal``) for a damaged seal, NotSupported if the library
    for its digests is missing, UsageError, TargetError; the job's result TargetError, SnapshotError
    if the file becomes shorter during the work, Cancelled.
    """
    if isinstance(snapshot, Descriptors):
        raise UsageError("a seal is written beside a path; descriptors have none")
    count, setting = check_channels(channels), parse_enum(DirectIO, direct_io, "direct_io")
    check("page_size", page_size, int, type(None))
    source = InputFile(snapshot)
    try:
        assert source.place is not None
        path = seal_path(source.place)
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


def verify_plain(
    plain: PlainFile,
    manifest: Manifest,
    seal: str,
    framing: InputFile,
    poll: Callable[[], None] = lambda: None,
) -> SealCheck:
    """Compare a file that is shown with its seal, on this thread; the file is read once.

    seal: the name of the seal in the result.
    framing: the same bytes as an open file, of which the bitmaps are read to locate damage.
    poll: called before each MiB; what it raises ends the work.

    Raises SnapshotError if the file becomes shorter during the work, TargetError.
    """
    started = time.monotonic()
    digests = Digests(manifest.algorithm)
    digests.resize(min(plain.size, manifest.size))
    digests.read_plain(plain, poll)
    if next(digests.differing(manifest.digests), None) is not None:
        _read_bitmaps(framing, manifest)
    return SealCheck(
        seal,
        manifest.algorithm,
        manifest.size,
        tuple(_damages(manifest, digests, plain.size, framing.fd)),
        (),
        manifest.clear_pages_zero,
        digests.bytes_read,
        time.monotonic() - started,
        False,
        "it is not a local file",
    )


def _read_bitmaps(framing: InputFile, manifest: Manifest) -> None:
    for block in manifest.head.blocks:
        end = min(block.bitmap_offset + block.bitmap_size, framing.size)
        for offset in range(block.bitmap_offset, 0 if block.external else end, PIECE):
            framing.read_at(offset, min(PIECE, end - offset))


def current_seal(path: str | os.PathLike[str], fd: int | None = None) -> Manifest | None:
    """Return the seal beside ``path`` if it is intact and the file was not modified since.

    That is: the file, ``fd`` if given, has the size and the time of modification that it was sealed
    with. The file is not read. None in all other cases.
    """
    try:
        info = os.stat(path) if fd is None else os.fstat(fd)
        return read_manifest(
            seal_path(path),
            wanted=lambda head: (head.size, head.mtime_ns) == (info.st_size, info.st_mtime_ns),
        )
    except (PyqmigrateError, OSError, ValueError):
        return None


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
        except TargetError as error:
            if self.source.view is None:
                raise
            raise self.source.view.explain(error) from error
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
        damages = tuple(_damages(manifest, digests, info.st_size, source.fd))
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
            str(self.path) if source.view is None else source.name + SUFFIX,
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


def _damages(manifest: Manifest, digests: Digests, size: int, fd: int) -> Iterator[Damage]:
    """Yield the damages of a file of ``size`` bytes; bitmaps are read from ``fd``."""
    sealed = manifest.size
    bad = [*digests.differing(manifest.digests)]
    if size < sealed and size % PIECE and (not bad or bad[-1] != size // PIECE):
        bad.append(size // PIECE)
    wrong = set(bad)

    def intact(start: int, end: int) -> bool:
        pieces = range(start // PIECE, count_pieces(end))
        return end <= min(size, sealed) and wrong.isdisjoint(pieces)

    def parts(start: int, end: int) -> tuple[Any, ...]:
        return tuple(parts_of(manifest.head, start, end, intact, fd))

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
        yield Damage(sealed, size - sealed, f"added: the file had {sealed} bytes and has {size}")


def _stretches(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield ``(first, last)`` of each run of consecutive numbers."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        yield members[0], members[-1]
