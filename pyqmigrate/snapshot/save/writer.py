"""A stream being written, of whatever kind: memories, channels, a target, and a report."""

from __future__ import annotations

import abc
import contextlib
import enum
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pyqmigrate import _core
from pyqmigrate.errors import Cancelled, NoSpace, UsageError
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.stream.configuration import Configuration
from pyqmigrate.format.stream.mapped_ram import BlockSpec
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.format.stream.writer import Head
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.memory import OpenMemory, RamBlock, attach, check_blocks, files_of
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.target import Target
from pyqmigrate.log import logger

__all__ = ["SaveReport", "Sparse", "StreamWriter", "WriteObserver"]


class Sparse(enum.StrEnum):
    """What becomes of zero pages. Their bits are clear in every case.

    ``auto``: short gaps between data are written along, where that saves calls; at most half as
    much again as the data, in every 4 MiB. ``exact``: a zero page is never allocated.
    ``dense``: everything is written.
    """

    AUTO = "auto"
    EXACT = "exact"
    DENSE = "dense"

    @property
    def gap_share(self) -> int:
        """What the gaps that are written along add to the data at most, in percent of it."""
        return _GAPS[self][1]

    def core(self) -> Any:
        """The policy as the core's ``struct qm_sparse *``."""
        gap, share = _GAPS[self]
        policy = _core.ffi.new("struct qm_sparse *")
        policy.max_gap = gap
        policy.gap_share = share
        policy.everything = self is Sparse.DENSE
        return policy


# Longest gap in bytes, and the gaps' share of the data in percent.
_GAPS = {Sparse.AUTO: (32 << 10, 50), Sparse.EXACT: (0, 0), Sparse.DENSE: (0, 0)}


@dataclass(frozen=True)
class SaveReport:
    """What a save did.

    ``bytes_written`` counts all descriptors; ``bytes_allocated`` is what the file holds on disk;
    ``seconds`` is wall time up to and with the last fsync. ``direct_io`` says whether pages went
    past the page cache, ``direct_io_reason`` why. ``unaligned_blocks`` names those whose memory
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
    """Hears what a writer of a mapped-ram file writes: digests, an increment, a log.

    Its methods are called by one thread at a time, but for what the core calls while it writes.
    """

    def watch(self, file: Any) -> object:
        """Set ``hook`` and ``hook_arg`` of a ``struct qm_file *``, which the core then calls
        for what channels write where nothing but holes was before."""

    def resize(self, size: int) -> None:
        """The file has ``size`` bytes."""

    def forget(self, at: int, length: int) -> None:
        """The bytes ``[at, at + length)`` were written otherwise, or again."""

    def finish(self, fd: int, name: str, channels: Channels) -> None:
        """All is written and durable, and nobody has seen it. What is raised here undoes the save.

        ``fd`` is a description of the file's own, ``channels`` may be used to read it.
        """

    def published(self, head: Head, mtime_ns: int) -> None:
        """The file has become a snapshot."""


class StreamWriter(abc.ABC):
    """A stream being written: ``begin``, passes over memory, ``finish``; all of it by ``run``.

    It owns what it opens from its construction on; :meth:`close` lets go of everything, and drops
    a file that was not finished. ``prefix`` is what a new file has before its stream. ``left_out``
    are the names of blocks that are listed, and whose content the loading side finds elsewhere
    (``x-ignore-shared``); None with that capability off.
    """

    sparse = Sparse.AUTO
    target: OutputFile
    settings: Configuration  # that of the stream

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        *,
        channels: int,
        reuse: bool,
        max_bandwidth: int,
        prefix: bytes = b"",
        left_out: Collection[str] | None = None,
    ) -> None:
        check_blocks(blocks)
        if not blocks:
            raise UsageError("no RAM blocks are given; a snapshot has at least one")
        self.started = time.monotonic()
        self.reuse = reuse
        self.prefix = prefix
        self.left_out = left_out or ()
        self.channels = Channels(channels, "pyqmigrate-save")
        self.channels.set_rate(max_bandwidth)
        self.memories: list[OpenMemory] = []
        self._cleanup = contextlib.ExitStack()
        with self._closed_on_error():
            for block in blocks:
                memory = attach(block, writable=False)
                self._cleanup.callback(memory.close)
                self.memories.append(memory)
            self.specs = [
                BlockSpec(b.name, m.length, b.page_size, b.address)
                for b, m in zip(blocks, self.memories, strict=True)
            ]

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _open(self, target: Target, direct_io: DirectIO) -> None:
        """The last thing a constructor does: from here on an existing file may be changed."""
        self.target = OutputFile.open(
            target, direct_io, reuse=self.reuse, in_use=files_of(self.memories), prefix=self.prefix
        )
        self._cleanup.callback(self.target.abort)

    @property
    def total(self) -> int:
        """Bytes of guest memory that is written."""
        return sum(self.specs[n].length for n in self.stored)

    @property
    def stored(self) -> list[int]:
        """The numbers of the blocks whose content is written."""
        return [n for n, spec in enumerate(self.specs) if spec.name not in self.left_out]

    def close(self) -> None:
        """May be repeated."""
        self._cleanup.close()

    def run(
        self,
        sections: bytes = b"",
        description: bytes | None = None,
        *,
        switchover_start: bool = False,
    ) -> SaveReport:
        """Save in one pass, make the file a snapshot, and close; arguments as in finish."""
        with self._cleanup:
            self.begin()
            self.write_pages()
            return self.finish(sections, description, switchover_start=switchover_start)

    @abc.abstractmethod
    def begin(self) -> None:
        """Check the space and write the head, without its magic."""

    @abc.abstractmethod
    def write_pages(self, selections: Sequence[Bitmap] | None = None) -> None:
        """One pass over all blocks, or over the pages that ``selections`` has of each."""

    @abc.abstractmethod
    def clean(self) -> int:
        """See that nothing of earlier passes can be read; returns how many pages that took."""

    @abc.abstractmethod
    def finish(
        self,
        sections: bytes = b"",
        description: bytes | None = None,
        *,
        switchover_start: bool = False,
    ) -> SaveReport:
        """Write what follows the pages (device ``sections`` verbatim), then publish."""

    @abc.abstractmethod
    def finish_with(self, tail: Iterable[bytes]) -> SaveReport:
        """Write ``tail``, all that follows the pages up to the end of the stream, then publish."""

    @abc.abstractmethod
    def _needed(self) -> int:
        """An upper bound of the bytes that the file will hold."""

    def _least(self) -> int:
        """A lower bound of them that costs nothing: counting what no disk holds would not end."""
        return 0

    @abc.abstractmethod
    def _count(self) -> int:
        """The bytes that the file will hold, found by looking at all of memory."""

    def _check_space(self) -> None:
        """Fail before the first page where the data cannot fit; count it only if in doubt."""
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
            _core.lib.qm_job_count_io(self.channels.core, len(MAGIC), 0)

    def _before_publication(self) -> None:
        """All is durable, and nobody has seen it; what is raised here undoes it."""
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
                m.name for m in self.memories if direct and m.unaligned(direct.mem_align)
            ),
        )
        logger.info("saved %s: %s", self.target.name, report)
        return report

    def _file_size(self) -> int:
        return os.fstat(self.target.fd).st_size

    def _direct_io_reason(self) -> str:
        return self.target.direct_io_reason
