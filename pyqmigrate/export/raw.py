"""Snapshot of any kind -> raw files: the memory of each RAM block in a sparse file of its own.

    with Snapshot("/snap/guest.mapped") as snapshot:
        report = unpack(snapshot, "/analysis")

Byte ``n`` of ``NAME.raw`` is byte ``n`` of the block; zero pages are holes. Block names come from
an untrusted file: :func:`raw_name` makes names of them that stay in the directory. ``blocks.json``
beside the files is an object of ``machine`` and ``blocks``, a list of objects with the fields of
:class:`RawBlock`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pyqmigrate.classic import ClassicSnapshot
from pyqmigrate.errors import (
    BlockMismatch,
    GuestMemoryError,
    NoSpace,
    UsageError,
    target_error,
)
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Job, Progress, check_channels
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.io.target import Direct, DirectIO, find_direct
from pyqmigrate.load import Clear
from pyqmigrate.log import logger
from pyqmigrate.opened import OpenedBlock
from pyqmigrate.opening import AnySnapshot
from pyqmigrate.snapshot import Snapshot
from pyqmigrate.spelling import choice
from pyqmigrate.staging import Place, StagedPass
from pyqmigrate.writer import Sparse

__all__ = ["INDEX", "RawBlock", "RawReport", "raw_name", "unpack"]

INDEX = "blocks.json"

_NAME_MAX = 255  # bytes of a file name on Linux file systems
_KEPT = 180  # characters of a name that is too long
_UNSAFE = re.compile(rb"^\.|[^A-Za-z0-9._-]")


@dataclass(frozen=True)
class RawBlock:
    """A RAM block and where its bytes went. Lengths in bytes.

    ``file`` is the name in the directory; None for a block whose content is not in the snapshot
    (``x-ignore-shared``), which has no pages of either kind. Bytes of ``name`` that are not UTF-8
    are surrogate escapes.
    """

    name: str
    file: str | None
    length: int
    page_size: int
    data_pages: int
    zero_pages: int


@dataclass(frozen=True)
class RawReport:
    """What an unpack did: ``bytes_allocated`` is what the raw files hold on disk, ``seconds``
    wall time up to and with the last fsync."""

    blocks: tuple[RawBlock, ...]
    bytes_allocated: int
    seconds: float


def raw_name(block: str) -> str:
    """The file name for a block: its bytes outside ``[A-Za-z0-9._-]`` as ``%XX``, and ``.raw``.

    So is a leading dot. Two blocks never share a name: one that would be too long for a file
    name is cut, and ends in ``%-`` and a digest of the whole.
    """
    name = block.encode("utf-8", "surrogateescape")
    safe = _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], name).decode("ascii")
    if len(safe) + len(".raw") > _NAME_MAX:
        safe = f"{safe[:_KEPT]}%-{hashlib.sha256(name).hexdigest()[:32]}"
    return f"{safe}.raw"


def unpack(
    snapshot: AnySnapshot,
    directory: str | os.PathLike[str],
    *,
    blocks: Sequence[str] | None = None,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    progress: Callable[[Progress], object] | None = None,
) -> RawReport:
    """Write blocks (all, or those named) as sparse raw files into ``directory``, and wait.

    The directory is made if it is not there; its parent must be. Files get their names only when
    all of them are whole and durable, ``blocks.json`` last; what had these names is replaced,
    a symbolic link by the file, never what it points to. Files are created 0600. A failure, an
    interrupt and an exception from ``progress`` leave no file behind that was not there; being
    killed leaves whole files at most (on file systems without unnamed ones also hidden parts).

    Raises BlockMismatch for a name that the snapshot has not, UsageError for one that it has
    without content and where the snapshot itself would be replaced, NoSpace, TargetError,
    SnapshotError and Cancelled as a load does.
    """
    started = time.monotonic()
    wanted = _choose(snapshot, blocks)
    path = os.fspath(directory)
    for name in ("", INDEX, *(raw_name(block.name) for block in wanted)):
        snapshot.refuse_as_target(os.path.join(path, name) if name else path)  # noqa: PTH118
    setting, channels = choice(DirectIO, direct_io, "direct_io"), check_channels(channels)
    with contextlib.ExitStack() as stack:
        dir_fd = _open_directory(path, stack)
        room = _Room(dir_fd, path, stack)
        if isinstance(snapshot, ClassicSnapshot):
            files, written = _place(
                snapshot, wanted, room, channels, setting, progress, named=blocks is not None
            )
        else:
            files, written = _load(snapshot, wanted, room, channels, setting, progress)
        index = room.new(INDEX)
        index.write(_index(snapshot.machine, written))
        for file in (*files, index):
            file.make_durable()
        allocated = sum(os.fstat(file.fd).st_blocks * 512 for file in files)
        for file in (*files, index):
            file.publish()
        with _refusing("cannot make durable", path):
            os.fsync(dir_fd)
    report = RawReport(written, allocated, time.monotonic() - started)
    logger.info("unpacked %s: %s", path, report)
    return report


def _choose(snapshot: AnySnapshot, names: Sequence[str] | None) -> list[OpenedBlock]:
    if names is None:
        return list(snapshot.blocks.values())
    for name in names:
        if name not in snapshot.blocks:
            raise BlockMismatch(
                f"the snapshot has no block {name!r}; it has {list(snapshot.blocks)}"
            )
        # Of a classic stream that is known when it has been read.
        if isinstance(snapshot, Snapshot) and snapshot.blocks[name].external:
            raise _elsewhere(name)
    return [block for name, block in snapshot.blocks.items() if name in names]


def _elsewhere(name: str) -> UsageError:
    return UsageError(f"the content of block {name!r} is not in this snapshot")


@dataclass(frozen=True)
class _Room:
    """A directory, open, in which files are made; ``stack`` drops those that get no name."""

    dir_fd: int
    path: str
    stack: contextlib.ExitStack

    def new(self, name: str, length: int = 0) -> _NewFile:
        file = self.stack.enter_context(_NewFile(self.dir_fd, self.path, name))
        file.resize(length)
        return file


def _open_directory(path: str, stack: contextlib.ExitStack) -> int:
    with _refusing("cannot use the directory", path):
        try:
            os.mkdir(path, 0o700)  # noqa: PTH102
            made = True
        except FileExistsError:
            made = False
        dir_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if made:
        stack.push(lambda kind, *_: _remove_empty(path) if kind else None)
    stack.callback(os.close, dir_fd)
    return dir_fd


def _remove_empty(path: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)  # noqa: PTH106


def _check_space(room: _Room, wanted: Sequence[OpenedBlock]) -> None:
    need = sum(block.data_pages * block.page_size for block in wanted)
    free = _free_bytes(room.dir_fd)
    if need > free:
        raise NoSpace(
            f"the pages to unpack need {need >> 20} MiB and {free >> 20} MiB are free", room.path
        )


def _free_bytes(fd: int) -> int:
    info = os.fstatvfs(fd)
    if info.f_blocks == 0:
        return sys.maxsize  # a file system that knows no limit
    return (info.f_bfree if os.geteuid() == 0 else info.f_bavail) * info.f_frsize


def _load(
    snapshot: Snapshot, wanted: Sequence[OpenedBlock], room: _Room, channels: int,
    direct_io: DirectIO, progress: Callable[[Progress], object] | None,
) -> tuple[list[_NewFile], tuple[RawBlock, ...]]:
    _check_space(room, wanted)
    files = {
        block.name: room.new(raw_name(block.name), block.length)
        for block in wanted if not block.external
    }
    if files:
        try:
            snapshot.load(
                {name: FileMemory(file.fd) for name, file in files.items()}, blocks=[*files],
                channels=channels, direct_io=direct_io, clear=Clear.LEAVE, progress=progress,
            )
        except GuestMemoryError as error:
            # This memory is a file of ours.
            raise target_error(error, "cannot write raw files", room.path) from error
    return [*files.values()], tuple(
        _describe(block, None if block.external else block.data_pages) for block in wanted
    )


def _place(
    snapshot: ClassicSnapshot, wanted: Sequence[OpenedBlock], room: _Room, channels: int,
    direct_io: DirectIO, progress: Callable[[Progress], object] | None, *, named: bool,
) -> tuple[list[_NewFile], tuple[RawBlock, ...]]:
    """A classic stream, in one pass; ``named``: every block was asked for by its name."""
    files, places = {}, {}
    for block in wanted:
        file = files[block.name] = room.new(raw_name(block.name), block.length)
        bitmap = Bitmap(block.num_pages)
        room.stack.callback(bitmap.close)
        direct = file.open_direct(direct_io, block.length, room.stack)
        places[block.name] = Place(file.fd, direct, 0, bitmap)
    work = StagedPass(
        snapshot.source, Channels(channels, "pyqmigrate-unpack"), Sparse.EXACT.core(), room.path,
        page_size=snapshot.page_size,
    )
    total = sum(block.length for block in wanted)
    stream = Job(work.reading, total, lambda: work.run(places)).wait(progress)
    here = {
        name: file for name, file in files.items()
        if name in work.mentioned or not stream.ignore_shared
    }
    if named and len(here) < len(files):
        raise _elsewhere(next(name for name in files if name not in here))
    return [*here.values()], tuple(
        _describe(block, places[block.name].bitmap.count() if block.name in here else None)
        for block in wanted
    )


def _describe(block: OpenedBlock, data_pages: int | None) -> RawBlock:
    """``data_pages`` is None where the content is elsewhere."""
    return RawBlock(
        name=block.name,
        file=None if data_pages is None else raw_name(block.name),
        length=block.length,
        page_size=block.page_size,
        data_pages=data_pages or 0,
        zero_pages=0 if data_pages is None else block.num_pages - data_pages,
    )


def _index(machine: str, blocks: tuple[RawBlock, ...]) -> bytes:
    value = {"machine": machine, "blocks": [asdict(block) for block in blocks]}
    return json.dumps(value, indent=2).encode("ascii") + b"\n"


class _NewFile:
    """A file without a name until :meth:`publish`; where the file system has no such files, under
    one that nobody looks for, and removed when that is not reached. ``fd`` is open for reading
    and writing."""

    def __init__(self, dir_fd: int, path: str, name: str) -> None:
        self._dir_fd = dir_fd
        self._name = name
        self._path = os.path.join(path, name)  # noqa: PTH118
        # Final names never start with a dot.
        self._temporary: str | None = None
        self._spare = f".{secrets.token_hex(16)}.partial"
        with _refusing("cannot create", self._path):
            self.fd = self._open()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        if Path("/proc/self/fd").exists():
            try:
                return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=self._dir_fd)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                    raise
        flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = os.open(self._spare, flags, 0o600, dir_fd=self._dir_fd)
        self._temporary = self._spare
        return fd

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._dir_fd)
        os.close(self.fd)

    def resize(self, length: int) -> None:
        with _refusing(f"cannot be made {length} bytes long", self._path):
            os.ftruncate(self.fd, length)

    def open_direct(
        self, setting: DirectIO, length: int, stack: contextlib.ExitStack
    ) -> Direct | None:
        """A descriptor past the page cache, if it is to be had, which ``stack`` closes; the file
        is all of a hole, ``length`` bytes long, and stays so."""
        direct, _ = find_direct(self.fd, None, setting, self._path, write_at=length)
        if direct is not None:
            stack.callback(os.close, direct.fd)
        self.resize(length)
        return direct

    def write(self, data: bytes) -> None:
        with _refusing("cannot write", self._path), open(self.fd, "wb", closefd=False) as file:
            file.write(data)

    def make_durable(self) -> None:
        with _refusing("cannot make durable", self._path):
            os.fsync(self.fd)

    def publish(self) -> None:
        with _refusing("cannot give the finished file its name", self._path):
            if self._temporary is None:
                try:
                    self._link(self._name)
                    return
                except FileExistsError:  # Linux cannot link over a name
                    self._link(self._spare)
                    self._temporary = self._spare
            os.replace(
                self._temporary, self._name, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd
            )
        self._temporary = None

    def _link(self, name: str) -> None:
        os.link(f"/proc/self/fd/{self.fd}", name, dst_dir_fd=self._dir_fd, follow_symlinks=True)


@contextlib.contextmanager
def _refusing(what: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise target_error(error, what, path) from error
