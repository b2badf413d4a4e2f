"""A compact file, read as the plain file that it contains.

    with contextlib.closing(SeekableFile("/snap/guest.zst")) as file:
        file.read(0, 4096)

It is a file in Zstandard's seekable form (:mod:`pyqmigrate.format.seekable`) of this package or of
another program. Frames are decompressed when they are read, and the last ones are kept. The checksum of a
frame is compared before a byte of it is given out.
"""

from __future__ import annotations

import os
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash

from pyqmigrate.errors import (
    DamagedContent,
    NotSupported,
    SnapshotError,
    SnapshotTruncated,
    TargetError,
    target_error,
)
from pyqmigrate.format.compact import FRAME, FRAME_SIZE_MAX, CompactHead
from pyqmigrate.format.seekable import FOOTER_SIZE, Footer, SeekTable, decode_skippable
from pyqmigrate.io.holes import next_hole

__all__ = ["SeekableFile", "checksum", "zstd_library"]

_CACHED = 32 << 20  # bytes of decompressed frames that are kept
_WINDOW_MAX = 1 << 27  # bytes that a frame may make the decompressor allocate
_ZERO_FRAME_MAX = 4096  # compressed bytes of a frame of zeros
_PAGE = 4096
_AROUND = 256 << 10  # bytes
_PIECE = 1 << 20  # bytes read at a time


def checksum(data: bytes | memoryview) -> int:
    """Return the checksum of a frame with this content, as the seek table has it."""
    return xxhash.xxh64_intdigest(data) & 0xFFFFFFFF


def zstd_library() -> Any:
    """Return the module ``zstandard``. Raises NotSupported if it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise NotSupported(
            "a compact file needs the package zstandard: pip install zstandard; or decompress it with"
            " zstd -d"
        ) from None
    return zstandard


class SeekableFile:
    """The content of the compact file at ``path``, a :class:`~pyqmigrate.io.plain_file.PlainFile`.

    ``companions`` are the files that were beside the plain file. Frames of zeros are holes. Raises
    SnapshotError for a damaged table, NotSupported without the package zstandard and for too large
    frames, TargetError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._zstd = zstd_library()
        self._local = threading.local()  # a decompressor is not for two threads at once
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._cached = 0
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise target_error(error, "cannot open", self._path) from error
        try:
            info = os.fstat(self._fd)
            self._table = self._read_table(info.st_size)
            head = self._read_head()
            self.size: int = self._table.size
            self.mtime_ns: int = info.st_mtime_ns if head is None else head.mtime_ns
            self._companions = {} if head is None else dict(head.files)
            if head is not None and head.size != self.size:
                raise SnapshotError(
                    f"the frames of the compact file have {self.size} bytes, and the plain file had "
                    f"{head.size}",
                    field="seek table",
                )
            self._holes, self._hole_ends = self._find_holes()
        except BaseException:
            self.close()
            raise

    @property
    def companions(self) -> Mapping[str, bytes]:
        return self._companions

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes at ``offset``; fewer only at the end of the file.

        Raises DamagedContent for a damaged frame, TargetError.
        """
        parts = self.views(offset, length)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def views(self, offset: int, length: int) -> list[memoryview]:
        """Return what :meth:`read` does in parts that are not copied: for writev()."""
        end = min(offset + length, self.size)
        parts: list[memoryview] = []
        if offset >= end:
            return parts
        frame = self._table.frame_at(offset)
        while offset < end:
            start, stop = self._table.positions[frame], self._table.positions[frame + 1]
            if stop > offset:
                upto = min(end, stop)
                parts.append(memoryview(self._content(frame))[offset - start : upto - start])
                offset = upto
            frame += 1
        return parts

    def cheap_range(self, offset: int, length: int) -> tuple[int, int]:
        """Return the start and end of the bytes around a range that was just read which are in the same
        frames, 256 KiB more on each side at most. Whole pages."""
        end = min(offset + length, self.size)
        if offset >= end:
            return offset, offset
        positions = self._table.positions
        start = positions[self._table.frame_at(offset)]
        stop = positions[self._table.frame_at(end - 1) + 1]
        low = -(-max(start, offset - _AROUND) // _PAGE) * _PAGE
        high = stop if stop == self.size else stop // _PAGE * _PAGE
        return min(low, offset), max(min(high, (end + _AROUND) // _PAGE * _PAGE), end)

    def next_data(self, offset: int) -> int | None:
        """Return where the first data at or after ``offset`` are; None if only a hole follows."""
        number = bisect_right(self._holes, offset) - 1
        if number >= 0 and offset < self._hole_ends[number]:
            offset = self._hole_ends[number]
        return offset if offset < self.size else None

    def next_hole(self, offset: int) -> int:
        """Return where the first hole at or after ``offset`` begins; the end of the file is one."""
        number = bisect_right(self._holes, offset) - 1
        if number >= 0 and offset < self._hole_ends[number]:
            return offset
        return self._holes[number + 1] if number + 1 < len(self._holes) else max(self.size, offset)

    def close(self) -> None:
        """Close it. Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._cache.clear()

    def _read_table(self, size: int) -> SeekTable:
        footer = Footer.decode(self._pread(max(size - FOOTER_SIZE, 0), FOOTER_SIZE), size)
        # Entries are never zeros. With a hole, a file of a few bytes can have any size.
        if next_hole(self._fd, footer.start, size) < size:
            raise SnapshotError("a hole in the seek table", offset=footer.start, field="seek table")
        return SeekTable.decode(self._pread(footer.start, footer.length), footer)

    def _read_head(self) -> CompactHead | None:
        """Return what the last frame has, if this package wrote it."""
        table, last = self._table, self._table.frames - 1
        if last < 0 or table.positions[last] != table.positions[last + 1]:
            return None
        start, end = table.offsets[last], table.offsets[last + 1]
        if end - start > FRAME_SIZE_MAX or next_hole(self._fd, start, end) < end:
            return None
        content = decode_skippable(FRAME, self._pread(start, end - start))
        return None if content is None else CompactHead.decode(content)

    def _find_holes(self) -> tuple[array[int], array[int]]:
        """Return where runs of frames of zeros begin and end, bytes of the content.

        Frames with the checksum of zeros are compared with one that was decompressed.
        """
        starts, ends = array("Q"), array("Q")
        table = self._table
        if table.checksums is None or not table.frames:
            return starts, ends
        size = table.positions[1]
        zeros = checksum(bytes(size))
        expected = b""
        for first, end in self._runs_of(size, zeros):
            if not expected:
                expected = self._zero_frame(first)
                if not expected:
                    return starts, ends
            while first < end:
                count = self._count_equal(first, end, expected)
                if count:
                    starts.append(table.positions[first])
                    ends.append(table.positions[first + count])
                first += count + 1
        return starts, ends

    def _runs_of(self, size: int, wanted: int) -> Iterator[tuple[int, int]]:
        """Yield the runs of frames ``[first, end)`` of ``size`` bytes that have this checksum."""
        table, first = self._table, 0
        assert table.checksums is not None
        for frame in range(table.frames + 1):
            if (
                frame < table.frames
                and table.checksums[frame] == wanted
                and table.positions[frame + 1] - table.positions[frame] == size
            ):
                continue
            if first < frame:
                yield first, frame
            first = frame + 1

    def _zero_frame(self, frame: int) -> bytes:
        """Return the compressed bytes of a frame if its content is zeros."""
        start, end = self._table.offsets[frame], self._table.offsets[frame + 1]
        if end - start > _ZERO_FRAME_MAX:
            return b""
        try:
            content = self._decompressed(frame)
        except TargetError:  # reading it will report that
            return b""
        return b"" if content.strip(b"\0") else self._pread(start, end - start)

    def _count_equal(self, first: int, end: int, expected: bytes) -> int:
        """Return how many of the frames from ``first`` on have exactly these compressed bytes."""
        table, length = self._table, len(expected)
        at_once = max(_PIECE // length, 1)
        frame = first
        while frame < end:
            start, count = table.offsets[frame], min(at_once, end - frame)
            data = self._pread(start, count * length)
            for number in range(count):
                part = data[number * length : (number + 1) * length]
                size = table.offsets[frame + 1] - table.offsets[frame]
                if part != expected or size != length:
                    return frame - first
                frame += 1
        return frame - first

    def _content(self, frame: int) -> bytes:
        with self._lock:
            content = self._cache.get(frame)
            if content is not None:
                self._cache.move_to_end(frame)
                return content
        content = self._decompressed(frame)
        with self._lock:
            if frame not in self._cache and self._fd >= 0:
                self._cache[frame] = content
                self._cached += len(content)
                while self._cached > _CACHED and len(self._cache) > 1:
                    self._cached -= len(self._cache.popitem(last=False)[1])
        return content

    def _decompressed(self, frame: int) -> bytes:
        """Return the content of a frame, checked. Raises DamagedContent, TargetError."""
        table = self._table
        start, end = table.offsets[frame], table.offsets[frame + 1]
        length = table.positions[frame + 1] - table.positions[frame]
        if end - start > length + (length >> 3) + _ZERO_FRAME_MAX:
            raise self._damaged(frame, "it is larger than its content")
        try:
            data = self._pread(start, end - start)
            # The library allocates what a frame claims to have.
            if self._zstd.frame_content_size(data) not in (length, -1):
                raise self._damaged(frame, "it has another length than in the seek table")
            content: bytes = self._decompressor().decompress(
                data, max_output_size=length, allow_extra_data=False
            )
        except (self._zstd.ZstdError, SnapshotTruncated) as error:
            raise self._damaged(frame, str(error)) from error
        if len(content) != length:
            raise self._damaged(frame, f"it has {len(content)} bytes instead of {length}")
        if table.checksums is not None and checksum(content) != table.checksums[frame]:
            raise self._damaged(frame, "its checksum does not match")
        return content

    def _decompressor(self) -> Any:
        if not hasattr(self._local, "decompressor"):
            self._local.decompressor = self._zstd.ZstdDecompressor(max_window_size=_WINDOW_MAX)
        return self._local.decompressor

    def _damaged(self, frame: int, why: str) -> DamagedContent:
        return DamagedContent(
            f"frame {frame} of the compact file is damaged ({why})",
            self._path,
            position=self._table.offsets[frame],
        )

    def _pread(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            try:
                part = os.pread(self._fd, length, offset)
            except OSError as error:
                raise target_error(error, "cannot read", self._path, position=offset) from error
            if not part:
                raise SnapshotTruncated("the compact file became shorter", offset=offset)
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
