"""Snapshot of any kind -> raw files: the memory of each RAM block in a sparse file of its own.

    with open_snapshot("/snap/guest.mapped") as snapshot:
        report = unpack(snapshot, "/analysis")

Byte ``n`` of ``NAME.raw`` is byte ``n`` of the block; zero pages are holes. Block names come from
an untrusted file: :func:`raw_name` makes safe file names of them. ``blocks.json`` beside the files is
an object of ``machine`` and ``blocks``, a list of objects with the fields of :class:`RawBlock`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from pyqmigrate.enums import Clear, parse_enum
from pyqmigrate.errors import GuestMemoryError, NoSpace, NotDurable, UsageError, target_error
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, check_channels
from pyqmigrate.io.direct_io import Direct, DirectIO, find_direct
from pyqmigrate.io.free_space import free_bytes
from pyqmigrate.io.in_use import refuse_in_use
from pyqmigrate.io.increments_of import refuse_base
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.io.new_file import NewFile, give_names
from pyqmigrate.io.own_files import FileKind, check_is_file, check_replaceable
from pyqmigrate.io.place import absolute
from pyqmigrate.log import logger
from pyqmigrate.snapshot.base import Block, Snapshot
from pyqmigrate.snapshot.load.memories import check_known
from pyqmigrate.snapshot.load.staging import Place
from pyqmigrate.snapshot.save.writer import Sparse

__all__ = ["INDEX", "RawBlock", "RawReport", "raw_name", "unpack"]

INDEX = "blocks.json"

_LIST = FileKind(
    "list of blocks", lambda head: re.match(rb'\s*\{\s*"machine"\s*:', head) is not None
)
_NAME_MAX = 255  # bytes of a file name on Linux file systems
_KEPT = 180  # characters of a name that is too long
_UNSAFE = re.compile(rb"^\.|[^A-Za-z0-9._-]")


@dataclass(frozen=True)
class RawBlock:
    """A RAM block and its file. Lengths in bytes.

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
    """What an unpack did: ``bytes_allocated`` by the raw files on disk, ``seconds`` of wall time up
    to and including the last fsync."""

    blocks: tuple[RawBlock, ...]
    bytes_allocated: int
    seconds: float


def raw_name(block: str) -> str:
    """Return the file name for a block: its name with bytes outside ``[A-Za-z0-9._-]``, and a
    leading dot, as ``%XX``, and ``.raw``.

    Two blocks never share a name: a name that is too long for a file is cut, and ends in ``%-`` and
    a digest of the whole.
    """
    name = block.encode("utf-8", "surrogateescape")
    safe = _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], name).decode("ascii")
    if len(safe) + len(".raw") > _NAME_MAX:
        safe = f"{safe[:_KEPT]}%-{hashlib.sha256(name).hexdigest()[:32]}"
    return f"{safe}.raw"


def unpack(
    snapshot: Snapshot,
    directory: str | os.PathLike[str],
    *,
    blocks: Sequence[str] | None = None,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    progress: Callable[[Progress], object] | None = None,
) -> RawReport:
    """Write blocks (all, or those named) as sparse raw files into ``directory``, and wait.

    The directory is created if it does not exist; its parent must exist. Files get their names only
    when all of them are complete and durable, ``blocks.json`` last, and either all of them or none:
    if that fails for one name, the old files are restored. Regular files are replaced (a
    ``blocks.json`` only if pyqmigrate wrote it); a symbolic link is replaced itself, not the file
    that it points to. Files are created 0600. A failure, an interrupt and an exception from
    ``progress`` leave no new file behind; a killed process leaves at most complete files, and hidden
    ones that end in ``.partial``.

    Raises BlockMismatch for a name that the snapshot does not have; UsageError for a block without
    content, if the snapshot itself would be replaced, and if one of the names belongs to something
    that is not a file; NoSpace, TargetError (NotDurable), SnapshotError and Cancelled as a load does.
    """
    started = time.monotonic()
    wanted = _choose(snapshot, blocks)
    path = os.fspath(absolute(directory))
    names = [*(raw_name(block.name) for block in wanted), INDEX]
    refuse_in_use([path, *(f"{path}/{name}" for name in names)], snapshot.in_use())
    setting, channels = parse_enum(DirectIO, direct_io, "direct_io"), check_channels(channels)
    with contextlib.ExitStack() as stack:
        dir_fd = _open_directory(path, stack)
        _check_what_is_there(dir_fd, path, names)
        output = _OutputDirectory(dir_fd, path, stack)
        if snapshot.one_pass:
            files, written = _place(
                snapshot, wanted, output, channels, setting, progress, named=blocks is not None
            )
        else:
            files, written = _load(snapshot, wanted, output, channels, setting, progress)
        index = output.new(INDEX)
        index.write(_index(snapshot.machine, written))
        for file in (*files, index):
            file.make_durable()
        allocated = sum(os.fstat(file.fd).st_blocks * 512 for file in files)
        with _refusing("cannot give the finished files their names", path):
            give_names([file.new for file in (*files, index)])
        try:
            os.fsync(dir_fd)
        except OSError as error:
            raise NotDurable(error.errno or errno.EIO, path) from error
    report = RawReport(written, allocated, time.monotonic() - started)
    logger.info("unpacked %s: %s", path, report)
    return report


def _choose(snapshot: Snapshot, names: Sequence[str] | None) -> list[Block]:
    if names is None:
        return list(snapshot.blocks.values())
    check_known(names, snapshot.blocks)
    for name in names:
        # For one pass that is known only at its end.
        if not snapshot.one_pass and snapshot.blocks[name].external:
            raise _elsewhere(name)
    return [block for name, block in snapshot.blocks.items() if name in names]


def _elsewhere(name: str) -> UsageError:
    return UsageError(f"the content of block {name!r} is not in this snapshot")


@dataclass(frozen=True)
class _OutputDirectory:
    """An open directory for new files; ``stack`` drops those that get no name."""

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
            os.mkdir(path, 0o700)
            made = True
        except FileExistsError:
            made = False
        dir_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if made:
        stack.push(lambda kind, *_: _remove_empty(path) if kind else None)
    stack.callback(os.close, dir_fd)
    return dir_fd


def _check_what_is_there(dir_fd: int, path: str, names: Sequence[str]) -> None:
    for name in names:
        place = f"{path}/{name}"
        with _refusing("cannot check", place):
            try:
                info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
        if stat.S_ISLNK(info.st_mode):
            continue
        check_is_file(place, info, "raw file" if name != INDEX else _LIST.noun)
        if name == INDEX:
            check_replaceable(place, _LIST)


def _remove_empty(path: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _check_space(output: _OutputDirectory, wanted: Sequence[Block]) -> None:
    need = sum(block.data_pages * block.page_size for block in wanted)
    free = free_bytes(output.dir_fd)
    if free is not None and need > free:
        raise NoSpace(
            f"the pages to unpack need {need >> 20} MiB and {free >> 20} MiB are free", output.path
        )


def _load(
    snapshot: Snapshot,
    wanted: Sequence[Block],
    output: _OutputDirectory,
    channels: int,
    direct_io: DirectIO,
    progress: Callable[[Progress], object] | None,
) -> tuple[list[_NewFile], tuple[RawBlock, ...]]:
    _check_space(output, wanted)
    files = {
        block.name: output.new(raw_name(block.name), block.length)
        for block in wanted
        if not block.external
    }
    if files:
        try:
            snapshot.load(
                {name: FileMemory(file.fd) for name, file in files.items()},
                blocks=[*files],
                channels=channels,
                direct_io=direct_io,
                clear=Clear.LEAVE,
                progress=progress,
            )
        except GuestMemoryError as error:
            # The "memory" here is the raw file being written.
            raise target_error(error, "cannot write raw files", output.path) from error
    return [*files.values()], tuple(
        _describe(block, None if block.external else block.data_pages) for block in wanted
    )


def _place(
    snapshot: Snapshot,
    wanted: Sequence[Block],
    output: _OutputDirectory,
    channels: int,
    direct_io: DirectIO,
    progress: Callable[[Progress], object] | None,
    *,
    named: bool,
) -> tuple[list[_NewFile], tuple[RawBlock, ...]]:
    """Unpack in one pass; ``named`` says that every block was asked for by its name."""
    files, places = {}, {}
    for block in wanted:
        file = files[block.name] = output.new(raw_name(block.name), block.length)
        bitmap = Bitmap(block.num_pages)
        output.stack.callback(bitmap.close)
        direct = file.open_direct(direct_io, block.length, output.stack)
        places[block.name] = Place(file.fd, direct, 0, bitmap)
    unpacker = snapshot.unpacker(
        Channels(channels, "pyqmigrate-unpack"), Sparse.EXACT.policy(), output.path
    )
    total = sum(block.length for block in wanted)
    stream = Job(unpacker.reading, total, lambda: unpacker.run(places)).wait(progress)
    stored = {
        name: file
        for name, file in files.items()
        if name in unpacker.mentioned or not stream.ignore_shared
    }
    if named and len(stored) < len(files):
        raise _elsewhere(next(name for name in files if name not in stored))
    return [*stored.values()], tuple(
        _describe(block, places[block.name].bitmap.count() if block.name in stored else None)
        for block in wanted
    )


def _describe(block: Block, data_pages: int | None) -> RawBlock:
    """Describe a block; ``data_pages`` is None if its content is in another file."""
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
    """A file that gets its name later; ``fd`` is open for reading and writing."""

    def __init__(self, dir_fd: int, path: str, name: str) -> None:
        self._path = f"{path}/{name}"
        refuse_base(absolute(self._path))
        with _refusing("cannot create", self._path):
            self.new = NewFile(dir_fd, name, secrets.token_hex(8))
        self.fd = self.new.fd

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.new.close()

    def resize(self, length: int) -> None:
        with _refusing(f"cannot be made {length} bytes long", self._path):
            os.ftruncate(self.fd, length)

    def open_direct(
        self, setting: DirectIO, length: int, stack: contextlib.ExitStack
    ) -> Direct | None:
        """Return a descriptor past the page cache if one is available, which ``stack`` closes. The
        file is one hole of ``length`` bytes, before and after."""
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


@contextlib.contextmanager
def _refusing(what: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        refused = target_error(error, what, path)
        for note in getattr(error, "__notes__", ()):
            refused.add_note(note)
        raise refused from error
