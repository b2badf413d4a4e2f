"""Make one compressed file of a snapshot, which every reading verb opens as it is.

    report = compact("/snap/guest.mapped", "/snap/guest.zst")
    print(report.compact_size / report.size)

The file is in Zstandard's seekable form (:mod:`pyqmigrate.format.seekable`): ``zstd -d`` makes the plain
file of it, and frames of 256 KiB are decompressed one by one when it is read at random
(:mod:`pyqmigrate.io.seekable_file`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.errors import (
    Cancelled,
    SnapshotError,
    SnapshotTruncated,
    TargetError,
    UsageError,
    target_error,
)
from pyqmigrate.export.convert import convert
from pyqmigrate.format.compact import FRAME, RECORD, SEAL, WORKING_SET, CompactHead
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.seal import SEALED_MAX
from pyqmigrate.format.seekable import encode_skippable, encode_table
from pyqmigrate.integrity.digests import Digests
from pyqmigrate.integrity.manifest import Manifest
from pyqmigrate.integrity.verify import current_seal
from pyqmigrate.io.channels import Channels, check_channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.holes import next_data
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.new_file import NewFile
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.own_files import open_directory
from pyqmigrate.io.place import resolve_symlink
from pyqmigrate.io.seekable_file import SeekableFile, checksum, zstd_library
from pyqmigrate.io.target import Descriptors, Target, split_target
from pyqmigrate.io.threads import starting_threads
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.snapshot.stale import find_stale

__all__ = ["CompactReport", "compact"]

_FRAME = 256 << 10  # bytes of a frame: larger ones make random reads slow
_BATCH = 16  # frames that one thread compresses at a time
_COMPANION_MAX = 64 << 20  # bytes of a file beside the snapshot, other than its seal
LEVEL_MAX = 19


@dataclass(frozen=True)
class CompactReport:
    """What was made. ``size`` of the plain file and ``compact_size`` are in bytes.

    ``converted``: SNAPSHOT was not a plain mapped-ram file, and the compact file has the one that a
    conversion makes. ``sealed``: the seal of SNAPSHOT was taken along; otherwise one was made.
    ``frames`` in all, ``zero_frames`` of them without data.
    """

    snapshot: str
    target: str
    size: int
    compact_size: int
    frames: int
    zero_frames: int
    converted: bool
    sealed: bool
    seconds: float
    channels: int


def compact(
    source: Snapshot | Target,
    target: str | os.PathLike[str],
    *,
    level: int = 1,
    channels: int = 2,
    progress: Callable[[Progress], object] | None = None,
) -> CompactReport:
    """Write the compact file of a snapshot, and wait. It has its name when it is complete and durable.

    source: an open snapshot, which stays open; or a path (of a pipe too), a ``file:`` URI or
        Descriptors. Of a mapped-ram file every byte is stored. Of another kind (an increment, a
        sequential stream, a background snapshot without bitmaps) the mapped-ram file that a
        conversion makes, which takes disk space in the target's directory temporarily.
    target: a path. A file there is replaced as by a save; not one that is read, or that increments
        refer to.
    level: of compression, 1 to 19.
    channels: threads that compress, 1 to 255.
    progress: called on this thread at most ten times a second, and once after the end; if it raises before that,
        the work is cancelled.

    The seal, the record (``.vm.json``) and the working set beside the snapshot become part of the file.
    Without a current seal one is made. Raises SnapshotError for a damaged or incomplete snapshot,
    NotSupported without the package zstandard, UsageError, TargetError (with EBUSY if the snapshot
    changes during the work), Cancelled.
    """
    check("level", level, int)
    if isinstance(level, bool) or not 1 <= level <= LEVEL_MAX:
        raise UsageError(f"level must be 1 to {LEVEL_MAX}, not {level}")
    check_channels(channels)
    check_callback("progress", progress)
    if isinstance(target, Descriptors) or split_target(target)[1]:
        raise UsageError("a compact file is written to a path, without an offset")
    zstd_library()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if isinstance(source, Snapshot):
            snapshot = source
        else:
            snapshot = open_snapshot(source, allow_pipe=True)
            stack.callback(snapshot.close)
        snapshot.refuse_as_target(target)
        output = OutputFile.open(target, DirectIO.OFF, in_use=snapshot.in_use())
        stack.callback(output.close)
        plain = _PlainSource.of(snapshot, output, channels, progress, stack)
        work = _Compaction(plain, output, level, Channels(channels, "pyqmigrate-compact"))
        job = Job(work.channels, plain.size, work.run)
        job.wait(progress)
        return CompactReport(
            snapshot=snapshot.source.name,
            target=output.name,
            size=plain.size,
            compact_size=work.written,
            frames=len(work.table),
            zero_frames=work.zero_frames,
            converted=plain.converted,
            sealed=plain.sealed,
            seconds=time.monotonic() - started,
            channels=channels,
        )


@dataclass(frozen=True)
class _PlainSource:
    """The plain file: its descriptor, and the snapshot in it. ``place`` is the path of the snapshot
    that it was made from, None without one."""

    snapshot: MappedRamSnapshot
    fd: int
    info: os.stat_result
    size: int
    place: Path | None
    manifest: Manifest | None
    converted: bool

    @property
    def sealed(self) -> bool:
        return self.manifest is not None

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        output: OutputFile,
        channels: int,
        progress: Callable[[Progress], object] | None,
        stack: contextlib.ExitStack,
    ) -> _PlainSource:
        place = None if snapshot.source.place is None else resolve_symlink(snapshot.source.place)
        converted = not isinstance(snapshot, MappedRamSnapshot) or snapshot.stream.background
        if converted:
            snapshot = _converted(snapshot, output, channels, progress, stack)
        assert isinstance(snapshot, MappedRamSnapshot)
        snapshot.verify()
        fd = snapshot.source.fd
        manifest = None if converted or place is None else current_seal(place, fd)
        info, size = os.fstat(fd), snapshot.source.size
        return cls(snapshot, fd, info, size, place, manifest, converted)

    def check_unchanged(self) -> None:
        now = os.fstat(self.fd)
        if (now.st_size, now.st_mtime_ns) != (self.info.st_size, self.info.st_mtime_ns):
            raise TargetError(
                errno.EBUSY, "was changed while it was compacted", self.snapshot.source.name
            )

    def companions(self, channels: Channels) -> dict[str, bytes]:
        """Return the files beside the snapshot by suffix: a seal, and the others if they exist.

        A working set belongs to the file that it was recorded of, not to a conversion.
        """
        manifest = self.manifest or self._seal(channels)
        found = {SEAL: manifest.head.encode(manifest.digests) + bytes(manifest.digests)}
        if self.place is not None:
            for suffix in (RECORD,) if self.converted else (RECORD, WORKING_SET):
                content = _small_file(self.place.with_name(self.place.name + suffix))
                if content is not None:
                    found[suffix] = content
        return found

    def _seal(self, channels: Channels) -> Manifest:
        """Return the seal of the file as it is, with old bytes under clear bits if it has any."""
        snapshot, own = self.snapshot, channels.sibling("pyqmigrate-seal")
        stale = not self.converted and bool(find_stale(snapshot, own))
        digests = Digests(Algorithm.XXH3_128)
        digests.resize(self.size)
        digests.read_rest(self.fd, snapshot.source.name, channels.sibling("pyqmigrate-seal"))
        return digests.seal(
            self.info.st_mtime_ns,
            snapshot.offset,
            snapshot.layouts,
            clear_pages_zero=not stale,
            bitmap_order=snapshot.bitmap_order,
        )


def _converted(
    snapshot: Snapshot,
    output: OutputFile,
    channels: int,
    progress: Callable[[Progress], object] | None,
    stack: contextlib.ExitStack,
) -> Snapshot:
    """Return the snapshot as a mapped-ram file without a name, in the target's directory."""
    assert output.place is not None
    try:
        dir_fd = open_directory(output.place)
        stack.callback(os.close, dir_fd)
        file = NewFile(dir_fd, output.place.name, os.urandom(8).hex())
    except OSError as error:
        raise target_error(
            error, "cannot create a file in the directory of", output.name
        ) from error
    stack.callback(file.close)
    try:
        convert(
            snapshot, Descriptors(file.fd), to="mapped-ram", channels=channels, progress=progress
        )
        plain = open_snapshot(Descriptors(file.fd))
    except TargetError as error:
        error.add_note(f"{output.name}: ")
        raise
    stack.callback(plain.close)
    return plain


def _small_file(path: Path) -> bytes | None:
    """Return the content of a regular file; None if there is none, or one that is too large for its
    kind. Raises TargetError."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO):
            return None
        raise target_error(error, "cannot open", path) from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _COMPANION_MAX:
            return None
        with open(fd, "rb", closefd=False) as file:
            return file.read(_COMPANION_MAX)
    except OSError as error:
        raise target_error(error, "cannot read", path) from error
    finally:
        os.close(fd)


_Frame = tuple[bytes, int, int]  # compressed bytes, length and checksum of the content


class _Compaction:
    def __init__(
        self, plain: _PlainSource, output: OutputFile, level: int, channels: Channels
    ) -> None:
        self._plain, self._output, self._level = plain, output, level
        self.channels = channels
        self.table: list[tuple[int, int, int]] = []
        self.written = 0
        self.zero_frames = 0
        self._library = zstd_library()
        zeros = bytes(_FRAME)
        self._zero: _Frame = self._compressor().compress(zeros), _FRAME, checksum(zeros)
        self._first = b""

    def run(self) -> None:
        plain = self._plain
        if plain.size > SEALED_MAX:
            raise UsageError(f"a file of {plain.size} bytes cannot be compacted")
        with starting_threads(), ThreadPoolExecutor(self.channels.count) as pool:
            for batch in self._in_order(pool):
                for frame in batch:
                    self._append(*frame)
        companions = plain.companions(self.channels)
        plain.check_unchanged()
        head = CompactHead(plain.size, plain.info.st_mtime_ns, companions)
        last = encode_skippable(FRAME, head.encode())
        self._append(last, 0, checksum(b""))
        self._write(encode_table(self.table))
        self._output.publish(self._first, self._check)

    def _in_order(self, pool: ThreadPoolExecutor) -> Iterator[list[_Frame]]:
        """Yield the frames in order, a batch at a time; few batches are in memory."""
        pending: deque[Future[list[_Frame]]] = deque()
        try:
            for offset in range(0, self._plain.size, _BATCH * _FRAME):
                pending.append(pool.submit(self._batch, offset))
                if len(pending) > 2 * self.channels.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _batch(self, offset: int) -> list[_Frame]:
        end = min(offset + _BATCH * _FRAME, self._plain.size)
        frames: list[_Frame] = []
        compressor = self._compressor()
        # A description of its own: to look for holes moves the position.
        try:
            fd = os.open(f"/proc/self/fd/{self._plain.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise target_error(error, "cannot open", self._plain.snapshot.source.name) from error
        try:
            while offset < end:
                if self.channels.cancelled:
                    raise Cancelled("cancelled")
                length = min(_FRAME, end - offset)
                frames.append(self._frame(compressor, fd, offset, length))
                offset += length
                self.channels.core.count_pages(length)
        finally:
            os.close(fd)
        return frames

    def _frame(self, compressor: Any, fd: int, offset: int, length: int) -> _Frame:
        if next_data(fd, offset, offset + length) == offset + length:
            if length == _FRAME:
                return self._zero
            data = bytes(length)
        else:
            data = self._read(fd, offset, length)
            self.channels.core.count_io(length)
            if length == _FRAME and not data.strip(b"\0"):
                return self._zero
        return compressor.compress(data), length, checksum(data)

    def _read(self, fd: int, offset: int, length: int) -> bytes:
        name = self._plain.snapshot.source.name
        parts = []
        while length:
            try:
                part = os.pread(fd, length, offset)
            except OSError as error:
                raise target_error(error, "cannot read", name, position=offset) from error
            if not part:
                raise SnapshotTruncated("the file became shorter", offset=offset)
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def _compressor(self) -> Any:
        # With a checksum of its own, so that zstd -t finds damage.
        return self._library.ZstdCompressor(level=self._level, write_checksum=True)

    def _append(self, data: bytes, length: int, digest: int) -> None:
        if data is self._zero[0]:
            self.zero_frames += 1
        self.table.append((len(data), length, digest))
        self._write(data)

    def _write(self, data: bytes) -> None:
        if not self._first:
            self._first = data[:4]
        self._output.write_at(self.written, data)
        self.written += len(data)

    def _check(self) -> None:
        """Read back what was written, except the frames."""
        with contextlib.closing(SeekableFile(f"/proc/self/fd/{self._output.fd}")) as file:
            if file.size != self._plain.size:
                raise SnapshotError("the compact file cannot be read back")
