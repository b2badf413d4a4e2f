"""Make a plain file of a stored snapshot: sparse, with its time, its seal and its record."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from pyqmigrate.errors import NoSpace, target_error
from pyqmigrate.format.seal import SUFFIX as SEAL_SUFFIX
from pyqmigrate.format.working_set import SUFFIX as WORKING_SET_SUFFIX
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.enclosing_store import refuse_in_store
from pyqmigrate.io.job import Progress
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.own_files import FileKind, check_replaceable, remove, write_whole
from pyqmigrate.io.seal_file import SEAL
from pyqmigrate.io.working_set_file import WORKING_SET_FILE
from pyqmigrate.store.place import Bytes
from pyqmigrate.store.reporting import Reporter
from pyqmigrate.store.store import Store
from pyqmigrate.store.stored_file import StoredFile

__all__ = ["GetReport", "get"]

_PIECE = 4 << 20  # bytes of the file that one thread reads and writes
_FLUSHED = 16  # pieces that are written to the disk together
# Bytes of one system call. For more, the kernel looks for larger free blocks, which a hypervisor that
# takes free memory back must first give again.
_WRITTEN = 256 << 10
_RECORD_SUFFIX = ".vm.json"
_RECORD_HEAD = (
    b'{\n  "format": "pyqmigrate vm record",'  # as pyqmigrate.vm.record.contents writes it
)
_RECORD = FileKind("record", lambda head: head.startswith(_RECORD_HEAD))
_KINDS = {SEAL_SUFFIX: SEAL, _RECORD_SUFFIX: _RECORD, WORKING_SET_SUFFIX: WORKING_SET_FILE}


@dataclass(frozen=True)
class GetReport:
    """What was written: ``path`` is absolute, ``beside`` are the other files; sizes in bytes."""

    name: str
    path: str
    beside: tuple[str, ...]
    size: int
    bytes_written: int
    bytes_allocated: int
    seconds: float


def get(
    store: Store,
    name: str,
    path: str | os.PathLike[str],
    *,
    channels: int = 4,
    progress: Callable[[Progress], object] | None = None,
) -> GetReport:
    """Write the file that a stored snapshot shows to ``path``, and its seal, record and working set
    beside it.

    The file appears when it is complete and durable, with its time of change, which the seal names;
    a file that has the name is replaced, but none in a store. Pages without data are holes.
    ``channels`` are threads. Raises NoSnapshot, SnapshotError or DamagedPack for damage in the store,
    UsageError for a path that must not be replaced, TargetError, NoSpace.
    """
    began = time.monotonic()
    refuse_in_store(path, "a file that is written")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(store.open_file(name))
        beside = [
            (check_replaceable(f"{os.fspath(path)}{suffix}", _KINDS[suffix]), _KINDS[suffix], data)
            for suffix, data in file.companions.items()
            if suffix in _KINDS
        ]
        out = OutputFile.open(os.fspath(path), DirectIO.OFF)
        stack.callback(out.close)
        _check_space(file, out)
        out.set_size(file.size)
        written = _copy(file, out, channels, progress)
        allocated = out.allocated_bytes()
        _remove_others(out, {kind for _, kind, _ in beside})
        out.publish(bytes(file.read(0, 4)), lambda: _set_time(out, file.mtime_ns))
        assert out.place is not None
        place = out.place
        for target, kind, data in beside:
            write_whole(target, kind, partial(_write, data))
    return GetReport(
        name,
        os.fspath(place),
        tuple(os.fspath(target) for target, _, _ in beside),
        file.size,
        written,
        allocated,
        time.monotonic() - began,
    )


def _copy(
    file: StoredFile, out: OutputFile, channels: int, progress: Callable[[Progress], object] | None
) -> int:
    """Copy all data with several threads; return how many bytes were written."""
    pieces = list(_pieces(file))
    total = sum(length for _, length in pieces)
    report = Reporter(progress, total)
    work: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for piece in pieces:
        work.put(piece)
    failed: list[BaseException] = []
    written = threading.Semaphore(0)  # pieces since the start
    ended = threading.Event()

    def flush() -> None:
        """Write to the disk what is in the page cache, so that the end does not wait for all."""
        try:
            while not ended.is_set():
                for _ in range(_FLUSHED):
                    written.acquire()
                if not ended.is_set():
                    out.flush()
        except BaseException as error:
            failed.append(error)

    def run() -> None:
        try:
            while not failed:
                offset, length = work.get_nowait()
                _write_views(out, offset, file.views(offset, length))
                report.add(length)
                written.release()
        except queue.Empty:
            pass
        except BaseException as error:
            failed.append(error)

    with ThreadPoolExecutor(max(1, channels) + 1, "pyqmigrate-get") as pool:
        try:
            pool.submit(flush)
            for future in [pool.submit(run) for _ in range(max(1, channels))]:
                future.result()
        except BaseException as error:
            failed.append(error)
        finally:
            ended.set()
            written.release(_FLUSHED)
    if failed:
        raise failed[0]
    return total


def _write_views(out: OutputFile, offset: int, views: Sequence[Bytes]) -> None:
    """Write all views, none of which is longer than a frame, one after another."""
    some: list[Bytes] = []
    length = 0
    for view in views:
        if some and length + len(view) > _WRITTEN:
            offset = _write_together(out, offset, some, length)
            some, length = [], 0
        some.append(view)
        length += len(view)
    if some:
        _write_together(out, offset, some, length)


def _write_together(out: OutputFile, offset: int, views: list[Bytes], length: int) -> int:
    """Write views with one system call; return where they end."""
    try:
        done = os.pwritev(out.fd, views, offset)
    except OSError as error:
        raise target_error(error, "cannot write", out.name, position=offset) from error
    if done < length:
        out.write_at(offset + done, b"".join(views)[done:])  # the rest, or why it cannot be
    return offset + length


def _pieces(file: StoredFile) -> Iterator[tuple[int, int]]:
    """Yield ranges of data, none of which crosses a multiple of the size of a piece."""
    for offset, length in file.data_ranges():
        end = offset + length
        while offset < end:
            stop = min(end, (offset // _PIECE + 1) * _PIECE)
            yield offset, stop - offset
            offset = stop


def _check_space(file: StoredFile, out: OutputFile) -> None:
    free = out.free_bytes()
    needed = sum(length for _, length in file.data_ranges())
    if free is not None and needed > free:
        raise NoSpace(f"cannot write {needed} bytes of data where {free} are free", out.name)


def _remove_others(out: OutputFile, written: set[FileKind]) -> None:
    """Remove the record and the working set of the file that is replaced."""
    assert out.place is not None
    for suffix, kind in _KINDS.items():
        if kind not in written:
            path = f"{out.place}{suffix}"
            try:
                remove(path, kind)
            except OSError as error:
                raise target_error(error, f"cannot remove the old {kind.noun}", path) from error


def _write(data: bytes, opened: BinaryIO) -> None:
    opened.write(data)


def _set_time(out: OutputFile, mtime_ns: int) -> None:
    """Give the file its time of change, durably."""
    try:
        os.utime(out.fd, ns=(time.time_ns(), mtime_ns))
        os.fsync(out.fd)
    except OSError as error:
        raise target_error(error, "cannot set the time of", out.name) from error
