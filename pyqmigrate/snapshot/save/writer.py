"""The base of the writers of streams: options, memories, channels, a target, and a report."""

from __future__ import annotations

import abc
import contextlib
import enum
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pyqmigrate.core import File, Policy
from pyqmigrate.errors import Cancelled, NoSpace, UsageError
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.configuration import Configuration
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.format.stream.writer import Head
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.in_use import FileId
from pyqmigrate.io.memory import OpenMemory, RamBlock, attach, check_blocks, files_of
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.target import Target
from pyqmigrate.log import logger

__all__ = ["SaveOptions", "SaveReport", "Sparse", "StreamWriter", "WriteObserver"]


class Sparse(enum.StrEnum):
    """How zero pages are written. Their bits are clear in every case.

    ``auto``: short gaps between data are written too, if that saves calls; in every 4 MiB they add
    up to at most half of the data. ``exact``: a zero page is never allocated. ``dense``: every page
    is written.
    """

    AUTO = "auto"
    EXACT = "exact"
    DENSE = "dense"

    @property
    def gap_share(self) -> int:
        """Upper bound of the gaps that are written too, in percent of the data."""
        return _GAPS[self][1]

    def policy(self, *, mark_zero: bool = False) -> Policy:
        """Return the policy for the core. ``mark_zero``, with DENSE: zero pages count as data."""
        gap, share = _GAPS[self]
        return Policy(
            max_gap=gap, gap_share=share, everything=self is Sparse.DENSE, mark_zero=mark_zero
        )


# Longest gap in bytes, and the share of the gaps in percent of the data.
_GAPS = {Sparse.AUTO: (32 << 10, 50), Sparse.EXACT: (0, 0), Sparse.DENSE: (0, 0)}


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How a stream is written, and what its head contains.

    ``channels``, ``direct_io``, ``sparse``, ``reuse``, ``max_bandwidth``, ``machine`` and
    ``target_page_bits`` are as in :func:`pyqmigrate.api.start_save`.

    mark_zero: with ``Sparse.DENSE``, zero pages count as data: their bits are set.
    uuid: the guest's, for targets that validate it.
    left_out: names of blocks that are listed, but whose content the loading side finds elsewhere
        (``x-ignore-shared``); None with that capability off.
    before: encoded elements that precede RAM's.
    prefix: what a new file has before its stream.
    stream_offset: where the stream starts then; None: directly after the prefix.
    """

    channels: int = 2
    direct_io: DirectIO = DirectIO.AUTO
    sparse: Sparse = Sparse.AUTO
    mark_zero: bool = False
    reuse: bool = False
    max_bandwidth: int = 0
    machine: str = ""
    target_page_bits: int | None = None
    uuid: bytes | None = None
    left_out: Collection[str] | None = None
    before: bytes = b""
    prefix: bytes = b""
    stream_offset: int | None = None


@dataclass(frozen=True)
class SaveReport:
    """What a save did.

    ``bytes_written`` counts all descriptors; ``bytes_allocated`` is the file's space on disk;
    ``seconds`` is wall time up to and including the last fsync. ``direct_io`` is whether pages
    bypassed the page cache, ``direct_io_reason`` why. ``unaligned_blocks`` are those whose memory
    had to be copied for direct I/O. ``seal`` is the algorithm of the seal, None without one.
    """

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
    unaligned_blocks: tuple[str, ...]
    seal: Algorithm | None = None


class WriteObserver(Protocol):
    """Observes what a writer of a mapped-ram file writes, to make digests, an increment, a log.

    Its methods are called by one thread at a time, except for the write hook of the file.
    """

    def watch(self, file: File) -> object:
        """Set a write hook on ``file``, which has only holes so far."""

    def resize(self, size: int) -> None:
        """The file has ``size`` bytes."""

    def forget(self, offset: int, length: int) -> None:
        """The bytes ``[offset, offset + length)`` were written again, or without the hook."""

    def finish(self, fd: int, name: str, channels: Channels) -> None:
        """The file is complete and durable, but not yet published. An exception undoes the save.

        ``fd`` has its own open file description; ``channels`` can be used to read it.
        """

    def published(self, head: Head, mtime_ns: int) -> None:
        """The file has become a snapshot."""


class StreamWriter(abc.ABC):
    """A stream being written: ``begin``, passes over memory, ``finish``. ``run`` does all three.

    It owns what it opens from its construction on. :meth:`close` closes everything, and removes a
    file that was not finished.
    """

    sparse = Sparse.AUTO
    target: OutputFile
    settings: Configuration  # of the stream

    def __init__(self, blocks: Sequence[RamBlock], options: SaveOptions, *, channels: int) -> None:
        check_blocks(blocks)
        if not blocks:
            raise UsageError("no RAM blocks are given; a snapshot has at least one")
        self.started = time.monotonic()
        self.reuse = options.reuse
        self.prefix = options.prefix
        self.stream_offset = options.stream_offset
        self.left_out = options.left_out or ()
        self.channels = Channels(channels, "pyqmigrate-save")
        self.channels.set_rate(options.max_bandwidth)
        self.memories: list[OpenMemory] = []
        self._cleanup = contextlib.ExitStack()
        with self._closed_on_error():
            for block in blocks:
                memory = attach(block, writable=False)
                self._cleanup.callback(memory.close)
                self.memories.append(memory)
            self.specs = [
                BlockSpec(block.name, memory.length, block.page_size, block.address)
                for block, memory in zip(blocks, self.memories, strict=True)
            ]

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _open(self, target: Target, direct_io: DirectIO) -> None:
        """Open the target, as the last step of a constructor: an existing file may change now."""
        self.target = OutputFile.open(
            target,
            direct_io,
            reuse=self.reuse,
            in_use=self._in_use(),
            prefix=self.prefix,
            stream_offset=self.stream_offset,
        )
        self._cleanup.callback(self.target.abort)

    def _in_use(self) -> dict[FileId, str]:
        """Return the files that must not be overwritten."""
        return files_of(self.memories)

    @property
    def total(self) -> int:
        """Bytes of guest memory to be written."""
        return sum(self.specs[n].length for n in self.stored)

    @property
    def stored(self) -> list[int]:
        """Numbers of the blocks whose content is written."""
        return [n for n, spec in enumerate(self.specs) if spec.name not in self.left_out]

    def close(self) -> None:
        """Close everything. Can be called again."""
        self._cleanup.close()

    def run(
        self,
        sections: bytes = b"",
        description: bytes | None = None,
        *,
        switchover_start: bool = False,
    ) -> SaveReport:
        """Save in one pass, publish the snapshot, and close. Arguments as in :meth:`finish`."""
        with self._cleanup:
            self.begin()
            self.write_pages()
            return self.finish(sections, description, switchover_start=switchover_start)

    @abc.abstractmethod
    def begin(self) -> None:
        """Check the space and write the head, without its magic."""

    @abc.abstractmethod
    def write_pages(self, selections: Sequence[Bitmap] | None = None) -> None:
        """Write all pages, or the pages selected by one bitmap per block, in one pass."""

    @abc.abstractmethod
    def clean(self) -> int:
        """Make old bytes of earlier passes unreadable; returns how many pages had some."""

    @abc.abstractmethod
    def finish(
        self,
        sections: bytes = b"",
        description: bytes | None = None,
        *,
        switchover_start: bool = False,
    ) -> SaveReport:
        """Write the end of the stream (device ``sections`` verbatim), then publish."""

    @abc.abstractmethod
    def finish_with(self, tail: Iterable[bytes]) -> SaveReport:
        """Write ``tail``, the whole rest of the stream, then publish."""

    @abc.abstractmethod
    def _needed(self) -> int:
        """Return an upper bound of the bytes that the file will have."""

    def _least(self) -> int:
        """Return a lower bound of them without scanning: a block can be longer than any disk."""
        return 0

    @abc.abstractmethod
    def _count(self) -> int:
        """Return the bytes that the file will have, by scanning all memory."""

    def _check_space(self) -> None:
        """Fail before the first page if the data cannot fit; scan only if in doubt."""
        free = self.target.free_bytes()
        if free is None or self._needed() <= free:
            return
        need = self._least()
        if need <= free:
            need = self._count()
        if need > free:
            raise NoSpace(
                f"the save needs {need >> 20} MiB and {free >> 20} MiB are free", self.target.name
            )

    def _check_cancelled(self) -> None:
        if self.channels.cancelled:
            raise Cancelled("cancelled")

    def _publish(self) -> None:
        self._check_cancelled()
        self.target.publish(MAGIC, self._before_publication)
        if not self.target.forward:
            self.channels.core.count_io(len(MAGIC))

    def _before_publication(self) -> None:
        """Called when the file is durable but not yet published; an exception undoes the save."""
        self._check_cancelled()

    def _report(self) -> SaveReport:
        totals = self.channels.totals()
        direct = self.target.direct
        report = SaveReport(
            data_pages=totals.data_pages,
            zero_pages=totals.zero_pages,
            bytes_written=totals.bytes_moved,
            bytes_allocated=self.target.allocated_bytes(),
            file_size=self._file_size(),
            seconds=time.monotonic() - self.started,
            direct_io=direct is not None,
            direct_io_reason=self._direct_io_reason(),
            channels=self.channels.count,
            sparse=self.sparse,
            unaligned_blocks=tuple(
                memory.name
                for memory in self.memories
                if direct and memory.unaligned(direct.mem_align)
            ),
        )
        logger.info("saved %s: %s", self.target.name, report)
        return report

    def _file_size(self) -> int:
        return os.fstat(self.target.fd).st_size

    def _direct_io_reason(self) -> str:
        return self.target.direct_io_reason
