"""A snapshot: a file with the state of a guest, opened for reading.

There is a class for each kind of file: :class:`~pyqmigrate.snapshot.mapped_ram.MappedRamSnapshot`,
:class:`~pyqmigrate.snapshot.sequential.SequentialSnapshot` and
:class:`~pyqmigrate.snapshot.increment.IncrementSnapshot`, whose pages are in two files.
:func:`~pyqmigrate.snapshot.detect.open_snapshot` chooses between them. All other code works with the
two base classes here, so that another kind needs a class and a line in ``detect.py``.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from pyqmigrate.argument_types import check_callback
from pyqmigrate.enums import Clear, Format
from pyqmigrate.errors import NotSupported, SnapshotError, TargetError, UsageError
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.in_use import FileId, Named, files_in_use, refuse_in_use
from pyqmigrate.io.place import seal_path
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors, Target, target_path

# What only some uses of a snapshot need is imported by them: a restore has no time for it.
if TYPE_CHECKING:
    from pyqmigrate.format.libvirt import LibvirtHeader
    from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder
    from pyqmigrate.format.stream.sequential import SequentialStream
    from pyqmigrate.format.stream.wire import Section, Stream
    from pyqmigrate.io.bitmap import Bitmap
    from pyqmigrate.io.channels import Channels
    from pyqmigrate.io.input import Source
    from pyqmigrate.io.job import Job, Progress
    from pyqmigrate.io.memory import Memory, SnapshotMemory
    from pyqmigrate.snapshot.block_array import BlockArray
    from pyqmigrate.snapshot.load.mapped_ram import LoadReport
    from pyqmigrate.snapshot.load.staging import StreamUnpacker

__all__ = ["Block", "Snapshot", "error_from_errno"]

R = TypeVar("R")


class Block(abc.ABC):
    """One RAM block of a snapshot. Lengths in bytes, offsets absolute in the file.

    ``address`` is its guest physical address if the file records it (``x-ignore-shared``), else
    None.
    """

    name: str
    length: int
    page_size: int
    address: int | None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}, {self.length} bytes>"

    @property
    def layout(self) -> BlockLayout | None:
        """Where the bitmap and the pages are in the file; None if pages have no fixed places."""
        return None

    @property
    def bitmap(self) -> Bitmap | None:
        """Which pages the file has, if it has a bitmap of them; read and checked on first use."""
        return None

    @property
    @abc.abstractmethod
    def snapshot(self) -> Snapshot:
        """The snapshot that the block belongs to."""

    @property
    def num_pages(self) -> int:
        return self.length // self.page_size

    @property
    @abc.abstractmethod
    def external(self) -> bool:
        """Whether the content is stored in another file (``x-ignore-shared``)."""

    @property
    @abc.abstractmethod
    def data_pages(self) -> int:
        """Pages with data."""

    @property
    def zero_pages(self) -> int:
        """Pages that are zero; an external block has pages of neither kind."""
        return 0 if self.external else self.num_pages - self.data_pages

    @abc.abstractmethod
    def memory(self) -> SnapshotMemory:
        """Return the block as memory to save, export or compare, until the snapshot is closed.

        Raises UsageError for an external block.
        """

    @abc.abstractmethod
    def runs(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int, bool]]:
        """Yield ``(from, to, whether they have data)`` for the pages ``[first, end)``, in turn."""

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of guest memory from byte ``offset`` of the block.

        Pages without data are zeros, whatever the file has in their place. Raises UsageError for
        bytes outside the block, SnapshotError when the file has become shorter, TargetError.
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
            number = error.errno or errno.EIO
            raise error_from_errno(number, self.snapshot.source, self.name) from None
        return pages[offset - start : offset - start + length]

    def as_array(self) -> BlockArray:
        """Return the block as an array for numpy, read when it is indexed; NotSupported without numpy.

        Raises UsageError for an external block.
        """
        from pyqmigrate.snapshot.block_array import BlockArray

        if self.external:
            raise self._elsewhere()
        return BlockArray(self)

    def _elsewhere(self) -> UsageError:
        return UsageError(f"the content of block {self.name!r} is not in this file")


def error_from_errno(number: int, source: Source, block: str) -> Exception:
    """Return the exception for pages that cannot be read from a snapshot's file."""
    if number == errno.ENODATA:
        return SnapshotError(
            "the file ends within a page that is marked as present: truncated",
            offset=source.size,
            block=block,
            field="pages",
        )
    if number == errno.EBADMSG:
        return SnapshotError("the change to a page does not fit it", block=block, field="xbzrle")
    error = TargetError(number, f"cannot read pages of block {block!r}", source.name)
    return error if source.view is None else source.view.explain(error)


class _Work(Protocol):
    """What reads a snapshot in the background."""

    def cancel(self) -> None: ...
    def join(self) -> object: ...


class _OpensByCall(abc.ABCMeta):
    """``Snapshot(target, ...)`` is ``open_snapshot(target, ...)``; a subclass takes a StreamFile."""

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        if cls is Snapshot:
            from pyqmigrate.snapshot.detect import open_snapshot

            return open_snapshot(*arguments, **options)
        return super().__call__(*arguments, **options)


class Snapshot(metaclass=_OpensByCall):
    """A file with the state of a guest, open for reading. Close it.

    Reads and loads may run in several threads at once. ``libvirt`` is the header before the stream,
    or None. ``one_pass`` says that the pages are best read front to back, by :meth:`unpacker`;
    reading them in another order takes :meth:`prepare_random_reads` first.
    """

    format: Format
    libvirt: LibvirtHeader | None
    one_pass = False
    makes_index = False  # whether reading through writes an index beside the file
    head: tuple[Section, ...] = ()  # sections before RAM, for one pass

    def __init__(self, stream_file: StreamFile) -> None:
        """Take over an open file; it is closed along with the snapshot, and if this fails."""
        if not isinstance(stream_file, StreamFile):
            raise UsageError("a snapshot is opened with open_snapshot(target)")
        self._lock = threading.RLock()
        self._jobs: list[_Work] = []
        self._stream_file: StreamFile | None = stream_file
        self.libvirt = stream_file.libvirt

    @property
    @abc.abstractmethod
    def blocks(self) -> Mapping[str, Block]:
        """The RAM blocks by name, in the order of the stream."""

    @property
    @abc.abstractmethod
    def machine(self) -> str:
        """The machine type of the guest, or an empty string."""

    @property
    @abc.abstractmethod
    def stream(self) -> Stream | SequentialStream:
        """The configuration of the stream, its blocks and its sections."""

    @property
    def bitmap_order(self) -> ByteOrder | None:
        """The byte order in which bitmaps are read; None in a stream without bitmaps."""
        return None

    @property
    def layouts(self) -> tuple[BlockLayout, ...]:
        """Where each block's bitmap and pages are; empty if pages have no fixed places."""
        return ()

    def read_through(
        self, progress: Callable[[Progress], object] | None = None
    ) -> Stream | SequentialStream:
        """Return :attr:`stream`; read the whole file first if that takes a pass over it.

        progress: called on this thread at most ten times a second; if it raises, the pass ends.
        """
        return self.stream

    def prepare_random_reads(self, progress: Callable[[Progress], object] | None = None) -> None:
        """Find where every page is, so that blocks can be read at random; wait for it."""
        self.read_through(progress)

    def unpacker(self, channels: Channels, sparse: Any, target: str) -> StreamUnpacker:
        """Return the one pass that moves all pages to fixed places in files.

        Only with ``one_pass``. ``channels`` write; ``sparse`` is the core's policy for zero pages,
        ``target`` names what is written in errors.
        """
        raise NotSupported(f"a {self.format} file is not read front to back")

    @abc.abstractmethod
    def verify(self) -> None:
        """Check the structure as far as the format allows. Raises SnapshotError."""

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
        """Start to load every block into the memory of its name; return at once.

        Arguments and errors are those of :meth:`load`. Closing the snapshot cancels the job.
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

        memories: a writable buffer or FileMemory for each block, of exactly its length; blocks
            whose content is in another file need none.
        channels: threads that move pages, 1 to 255.
        direct_io: whether to read past the page cache.
        clear: whether pages without data are made zero, or left as they are.
        blocks: the names of the blocks to load; None is all of them.
        progress: called on this thread at most ten times a second; if it raises, the load is
            cancelled.

        A sequential stream is read front to back, by one channel through the page cache; ``clear``
        applies to pages that no record mentions.

        Raises BlockMismatch (a ValueError) for unknown, missing or mis-sized memories,
        SnapshotError for a damaged file, GuestMemoryError, TargetError, Cancelled. Pages that were
        loaded before a failure stay in the memories.
        """
        check_callback("progress", progress)
        return self.start_load(
            memories, channels=channels, direct_io=direct_io, clear=clear, blocks=blocks
        ).wait(progress)

    @property
    def stream_file(self) -> StreamFile:
        """The open file and its stream. Raises UsageError when the snapshot is closed."""
        if self._stream_file is None:
            raise UsageError("the snapshot is closed")
        return self._stream_file

    @property
    def source(self) -> Source:
        """The open file. Raises UsageError when the snapshot is closed."""
        return self.stream_file.source

    @property
    def offset(self) -> int:
        """Where the stream starts in the file, bytes."""
        return self.stream_file.offset

    @property
    def size(self) -> int:
        """Apparent size of the file, bytes; of a pipe, the bytes that were read."""
        return self.source.file_size

    @property
    def allocated(self) -> int:
        """Bytes of disk that the file holds."""
        return self.source.allocated_bytes()

    def refuse_as_target(self, target: Target) -> None:
        """Raise UsageError if ``target`` is this very file, which writing would destroy.

        Links are followed, and a hard link is the file.
        """
        places: list[Named]
        if isinstance(target, Descriptors):
            places = [fd for fd in (target.buffered, target.direct) if fd is not None]
        else:
            path = target_path(target)
            places = [path, seal_path(path)]
        refuse_in_use(places, self.in_use())

    def in_use(self) -> dict[FileId, str]:
        """Return the file, and those beside it, none of which may be overwritten."""
        name = self.source.name
        files: list[tuple[Named, str]] = [
            (self.source.file_fd, f"the snapshot that is read ({name!r})")
        ]
        if self.source.place is not None:
            seal = seal_path(self.source.place)
            files.append((seal, f"the seal of the snapshot that is read ({name!r})"))
        if self.source.view is not None:  # of a compact file; a snapshot of a store is not a file
            files.append((name, f"the compact file that is read ({name!r})"))
        return files_in_use(files)

    @property
    def identity(self) -> FileId:
        """Device and inode of the file."""
        return FileId.of(os.fstat(self.source.file_fd))

    def _known(self, names: Collection[str] | None) -> list[str]:
        """Return these names (None: of all blocks), in the order of the stream."""
        from pyqmigrate.snapshot.load.memories import check_known

        check_known(names or (), self.blocks)
        return [name for name in self.blocks if names is None or name in names]

    def _follow(self, job: Job[R]) -> Job[R]:
        """Cancel the job when the snapshot is closed before it ends."""
        self._jobs.append(job)
        return job.at_end(lambda: self._jobs.remove(job))

    def attach(self, work: _Work) -> None:
        """Cancel ``work``, which reads the snapshot, and wait for its end when this is closed."""
        _ = self.source  # raises if the snapshot is closed
        self._jobs.append(work)

    def detach(self, work: _Work) -> None:
        """Forget attached work that has ended. Idempotent."""
        with contextlib.suppress(ValueError):
            self._jobs.remove(work)

    def _drop(self) -> None:
        """Free memory; called once, after all jobs have ended."""

    def close(self) -> None:
        """Cancel running jobs, close the file and free memory. Idempotent."""
        for job in list(self._jobs):
            job.cancel()
            job.join()
        with self._lock:
            if self._stream_file is not None:
                self._stream_file.close()
                self._stream_file = None
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
