"""What every opened snapshot has, whichever form its file has.

There are two: :class:`~pyqmigrate.snapshot.mapped_ram.MappedRamSnapshot`, a mapped-ram file, and
:class:`~pyqmigrate.snapshot.sequential.SequentialSnapshot`, a sequential stream.
:func:`~pyqmigrate.snapshot.detect.open_snapshot` looks which one a file is.
"""

from __future__ import annotations

import abc
import enum
import errno
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.enums import Format
from pyqmigrate.errors import BlockMismatch, NotSupported, SnapshotError, TargetError, UsageError
from pyqmigrate.format.compression import MAGIC_MAX, Compression
from pyqmigrate.format.libvirt import LibvirtHeader, is_libvirt, read_header
from pyqmigrate.format.stream.wire import MAGIC, Stream
from pyqmigrate.io.in_use import FileId, Named, files_in_use, refuse_in_use
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.memory import Memory, SnapshotMemory
from pyqmigrate.io.target import Descriptors, DirectIO, InputFile, Target, seal_path, target_path
from pyqmigrate.snapshot.load.mapped_ram import Clear, LoadReport

if TYPE_CHECKING:
    from pyqmigrate.format.stream.sequential import SequentialStream

__all__ = ["Kind", "Located", "Block", "Snapshot", "locate", "open_source"]


class Kind(enum.StrEnum):
    """The form of a file: pages at fixed places, or records of pages one after another."""

    MAPPED_RAM = "mapped-ram"
    STREAM = "stream"


@dataclass(frozen=True)
class Located:
    """An open file, ``source.offset`` being where the stream starts; behind what, if libvirt's."""

    source: InputFile
    libvirt: LibvirtHeader | None = None


def locate(target: Target | Located, offset: int | None = None, *, piped: bool = False) -> Located:
    """Open a file and find out where its stream starts; whoever calls closes the source.

    target: a path, a ``file:`` URI or Descriptors (borrowed, open for reading).
    offset: where the stream starts, bytes, for a path. Where none is given in any way, a header
        of libvirt's at the start of the file tells.
    piped: whether the path of a pipe or socket will do.

    A compressed stream, and that in a compressed image of libvirt's, is decompressed as it is read:
    a forward-only source, as that of a pipe is (:mod:`pyqmigrate.io.pipe`).

    Raises SnapshotError for a save image that libvirt did not finish, NotSupported for a stream
    that is compressed in a way that cannot be read here and for a file of another known kind (a
    disk image, a core), which the message names; UsageError, TargetError.
    """
    if isinstance(target, Located):
        return target
    check("offset", offset, int, type(None))
    check("piped", piped, bool)
    source = open_source(target, piped=piped)
    try:
        if offset is not None:
            if isinstance(target, Descriptors) or source.offset:
                raise UsageError("the offset is given twice")
            if not 0 <= offset < 1 << 63:
                raise UsageError(f"offset {offset} is not a file position")
            source.offset = offset
        source = _decompressed(source)
        header = None
        if offset is None and not source.offset and is_libvirt(source.read_at(0, 16)):
            header = read_header(source)
            if not header.complete:
                raise SnapshotError("libvirt did not finish this save image", offset=0)
            source.offset = header.stream_offset
            if header.format.compressed:
                source = _decompress(source, Compression(header.format.name.lower()))
        if source.read_at(source.offset, len(MAGIC)) != MAGIC:
            # A restore has no time for what only other files need.
            from pyqmigrate.format.foreign import recognize

            foreign = recognize(source, source.offset)
            if foreign is not None:
                raise NotSupported(str(foreign))
    except BaseException:
        source.close()
        raise
    return Located(source, header)


def _decompressed(source: InputFile) -> InputFile:
    """The same source, or what comes out of it where all of it is compressed."""
    compression = Compression.of(source.read_at(source.offset, MAGIC_MAX))
    return source if compression is None else _decompress(source, compression)


def _decompress(source: InputFile, compression: Compression) -> InputFile:
    # Seldom needed, and a restore has no time for it.
    from pyqmigrate.io.decompression import decompressed

    return decompressed(source, compression, source.offset)


def open_source(target: Target, *, piped: bool) -> InputFile:
    """Open a file or block device, or with ``piped`` the path of a pipe or socket."""
    if piped and isinstance(target, str | os.PathLike):
        from pyqmigrate.io.pipe import ForwardInput, PipeReader

        path = os.fsdecode(target)
        if PipeReader.is_pipe(path):
            pipe = PipeReader(path)
            return ForwardInput(path, lambda: pipe, pipe.close)
    return InputFile(target)


class Block(abc.ABC):
    """One RAM block of an opened snapshot. Lengths in bytes.

    ``address`` is that in the guest, where the file tells it (``x-ignore-shared``); else None.
    """

    name: str
    length: int
    page_size: int
    address: int | None

    @property
    def num_pages(self) -> int:
        return self.length // self.page_size

    @property
    @abc.abstractmethod
    def external(self) -> bool:
        """Whether the content is kept in another file (``x-ignore-shared``)."""

    @property
    @abc.abstractmethod
    def data_pages(self) -> int:
        """Pages that the file holds."""

    @property
    def zero_pages(self) -> int:
        """Pages that the file says are zero; an external block has pages of neither kind."""
        return 0 if self.external else self.num_pages - self.data_pages

    @abc.abstractmethod
    def memory(self) -> SnapshotMemory:
        """The block as memory to save, export or compare; good until the snapshot is closed.

        UsageError for an external block.
        """

    @abc.abstractmethod
    def runs(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int, bool]]:
        """``(from, to, whether the file holds them)`` for the pages ``[first, end)``, in turn."""

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes of guest memory from byte ``offset`` of the block.

        Pages that the file says are zero are zeros, whatever it has there. UsageError outside the
        block, SnapshotError when the file has become shorter, TargetError.
        """
        if offset < 0 or length < 0 or offset + length > self.length:
            raise UsageError(
                f"bytes {offset} to {offset + length} are not inside block {self.name!r} "
                f"of {self.length} bytes"
            )
        if self.external:
            raise self._elsewhere()
        if length == 0:
            return b""
        memory = self.memory()
        start = offset // self.page_size * self.page_size
        stop = -(-(offset + length) // self.page_size) * self.page_size
        try:
            pages = memory.source.read(start, stop - start)
        except OSError as error:
            raise self._refused(error.errno or errno.EIO) from None
        return pages[offset - start : offset - start + length]

    def _elsewhere(self) -> UsageError:
        return UsageError(f"the content of block {self.name!r} is not in this file")

    @abc.abstractmethod
    def _refused(self, number: int) -> Exception:
        """The exception for a read that failed with this errno."""


def error_from_errno(number: int, source: InputFile, block: str) -> Exception:
    """The exception for pages that cannot be read from a snapshot's file."""
    if number == errno.ENODATA:
        return SnapshotError(
            "the file ends within a page that is marked as present: truncated",
            offset=source.size,
            block=block,
            field="pages",
        )
    if number == errno.EBADMSG:
        return SnapshotError("the change to a page does not fit it", block=block, field="xbzrle")
    return TargetError(number, f"cannot read pages of block {block!r}", source.name)


class Snapshot(abc.ABC):
    """A finished file, open for reading; reads and loads may run in several threads at once.

    ``libvirt`` is the header before the stream, or None. Close it when it is done with.
    """

    format: Format
    libvirt: LibvirtHeader | None

    def __init__(self, located: Located) -> None:
        self._lock = threading.RLock()
        self._jobs: list[Job[Any]] = []
        self._source: InputFile | None = located.source
        self.libvirt = located.libvirt

    @property
    @abc.abstractmethod
    def blocks(self) -> Mapping[str, Block]:
        """The RAM blocks by name, in the order of the stream."""

    @property
    @abc.abstractmethod
    def machine(self) -> str:
        """The machine type of the guest, perhaps empty."""

    @property
    @abc.abstractmethod
    def stream(self) -> Stream | SequentialStream:
        """What the stream says, and its sections."""

    @abc.abstractmethod
    def verify(self) -> None:
        """Check the structure as far as the format allows; SnapshotError says what is wrong."""

    @abc.abstractmethod
    def start_load(
        self,
        memories: Mapping[str, Memory],
        *,
        channels: int = 2,
        direct_io: DirectIO | str = DirectIO.AUTO,
        clear: Clear | str = Clear.ZERO,
        blocks: Collection[str] | None = None,
    ) -> Job[LoadReport]:
        """Begin to load every block into the memory of its name; returns at once.

        Arguments and errors as :meth:`load`. To close the snapshot cancels the job.
        """

    def load(
        self,
        memories: Mapping[str, Memory],
        *,
        channels: int = 2,
        direct_io: DirectIO | str = DirectIO.AUTO,
        clear: Clear | str = Clear.ZERO,
        blocks: Collection[str] | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> LoadReport:
        """Load every block into the memory of its name and wait.

        memories: a writable buffer or FileMemory for each block, of just its length; blocks whose
            content is in another file need none.
        channels: threads that move pages, 1 to 255.
        direct_io: whether to read past the page cache.
        clear: whether pages whose bit is clear are made zero, or left as they are.
        blocks: the names of the blocks to load; None is all of them.
        progress: called on this thread at most ten times a second; what it raises cancels.

        A sequential stream is read front to back, by one channel through the page cache; ``clear`` is
        about pages that it does not mention.

        Raises BlockMismatch (a ValueError) for unknown, missing or mis-sized memories,
        SnapshotError for a damaged file, GuestMemoryError, TargetError, Cancelled. What was
        loaded before a failure stays in the memories.
        """
        check_callback("progress", progress)
        return self.start_load(
            memories, channels=channels, direct_io=direct_io, clear=clear, blocks=blocks
        ).wait(progress)

    @property
    def source(self) -> InputFile:
        """The open file. UsageError when the snapshot is closed."""
        if self._source is None:
            raise UsageError("the snapshot is closed")
        return self._source

    @property
    def offset(self) -> int:
        """Where the stream starts in the file, bytes."""
        return self.source.offset

    @property
    def size(self) -> int:
        """Apparent size of the file, bytes; of a pipe, what has come of it."""
        return self.source.file_size

    @property
    def allocated(self) -> int:
        """Bytes of disk that the file holds."""
        return self.source.allocated_bytes()

    def refuse_as_target(self, target: Target) -> None:
        """UsageError when ``target`` leads to this very file: writing there would destroy it.

        Links are followed, and a hard link is the file. What leads nowhere is no matter here.
        """
        places: list[Named]
        if isinstance(target, Descriptors):
            places = [fd for fd in (target.buffered, target.direct) if fd is not None]
        else:
            path = target_path(target)
            places = [path, seal_path(path)]
        refuse_in_use(places, self.in_use())

    def in_use(self) -> dict[FileId, str]:
        """The file, and what is kept beside it, which nothing may write over."""
        name = self.source.name
        files: list[tuple[Named, str]] = [
            (self.source.file_fd, f"the snapshot that is read ({name!r})")
        ]
        if self.source.place is not None:
            seal = seal_path(self.source.place)
            files.append((seal, f"the seal of the snapshot that is read ({name!r})"))
        return files_in_use(files)

    @property
    def identity(self) -> FileId:
        """Device and inode of the file."""
        return FileId.of(os.fstat(self.source.file_fd))

    def _known(self, names: Collection[str] | None) -> list[str]:
        """These names (None: of all blocks), in the order of the stream."""
        unknown = [name for name in names or () if name not in self.blocks]
        if unknown:
            raise BlockMismatch(
                f"the snapshot has no block {unknown[0]!r}; it has {[*self.blocks]}"
            )
        return [name for name in self.blocks if names is None or name in names]

    R = TypeVar("R")

    def _follow(self, job: Job[R]) -> Job[R]:
        """Cancel the job when the snapshot is closed before it ends."""
        self._jobs.append(job)
        return job.at_end(lambda: self._jobs.remove(job))

    def _drop(self) -> None:  # noqa: B027
        """Give memory back; called once, after all jobs have ended."""

    def close(self) -> None:
        """Cancel the jobs under way, close the file and drop what was kept. May be repeated."""
        for job in list(self._jobs):
            job.cancel()
            job.join()
        with self._lock:
            if self._source is not None:
                self._source.close()
                self._source = None
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
