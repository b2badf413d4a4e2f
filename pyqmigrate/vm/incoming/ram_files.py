"""The files that a QEMU has guest RAM in, when a snapshot is loaded into it.

QEMU loads into such a file as it finds it: it writes the pages that the snapshot has, over
whatever guest runs on them, and leaves the others alone, which are zero for the guest and not for
a file that held another one. So a file that somebody uses is refused, and one that holds what
nobody uses any more is emptied when QEMU is there and has not loaded yet.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from pyqmigrate.errors import NotSupported, TargetError, UsageError
from pyqmigrate.format.uri import parse_size
from pyqmigrate.io.holes import next_data
from pyqmigrate.snapshot.mapped_ram import MappedRamBlock, MappedRamSnapshot
from pyqmigrate.vm.incoming.ram_mapping import block_of, memories_of, memory_backends
from pyqmigrate.vm.qemu.command_line import CommandLine, Option, is_on

__all__ = ["RamFiles", "loadable"]


def loadable(command: CommandLine, snapshot: MappedRamSnapshot) -> tuple[CommandLine, list[str]]:
    """``command`` for a QEMU that reads all of its memory, and what was changed in it.

    Nothing is written into memory before the snapshot is (``prealloc``), and ``-mem-path`` of a
    file that holds something is left out: machines map it privately, and would show it.
    """
    notes = []
    if command.has("mem-prealloc"):
        command = command.without("mem-prealloc")
        notes.append("-mem-prealloc is left out: memory comes as it is loaded")
    changes: dict[Option, Option] = {}
    devices = memories_of(command)
    for option, properties in memory_backends(command):
        name = properties.get("id", "")
        if is_on(properties.get("prealloc")) and name not in devices:
            changes[option] = option.with_property("prealloc", False)
            notes.append(f"prealloc=on of {name!r} is off: memory comes as it is loaded")
    command = command.replaced(changes)
    paths = command.all("mem-path")
    if paths and _holds_something(Path(paths[-1].value or "")):
        command = command.without("mem-path")
        notes.append(f"{paths[-1]} is left out: what the file holds would be the guest's memory")
    return command, notes


def _holds_something(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        info = os.fstat(fd)
        return not stat.S_ISDIR(info.st_mode) and next_data(fd, 0, info.st_size) < info.st_size
    finally:
        os.close(fd)


class _RamFile(NamedTuple):
    fd: int
    path: str
    start: int
    length: int

    def has_data(self) -> bool:
        end = min(self.start + self.length, os.fstat(self.fd).st_size)
        return next_data(self.fd, self.start, end) < end

    def clear(self) -> None:
        length = min(self.length, os.fstat(self.fd).st_size - self.start)
        if length <= 0:
            return
        try:
            with mmap.mmap(self.fd, length, offset=self.start) as view:
                view.madvise(mmap.MADV_REMOVE)
            if not self.has_data():
                return
            raise OSError(errno.EOPNOTSUPP, "it still has data")
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None) or errno.EINVAL
            raise TargetError(
                number, "what this memory file held cannot be removed: remove the file", self.path
            ) from error


class RamFiles:
    """Those of one QEMU that is about to be started; a context manager.

    ``notes`` say which of them will be emptied by :meth:`clear`.
    """

    def __init__(
        self, command: CommandLine, snapshot: MappedRamSnapshot, mapped: Collection[str] = ()
    ) -> None:
        """Look at what ``command`` makes; ``mapped`` are blocks whose memory is not loaded.

        Raises UsageError for a file that another process uses, or that QEMU maps privately while
        it holds something; NotSupported where that cannot be found out. Blocks.
        """
        self.notes: list[str] = []
        self._to_clear: list[_RamFile] = []
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for path, block, properties in _files(command, snapshot, mapped):
                self._take(path, block, properties)
            undo.pop_all()

    def _take(self, path: str, block: MappedRamBlock, properties: dict[str, str]) -> None:
        shared = is_on(properties.get("share"))
        try:
            # A pipe or a device might wait, or do something, when it is opened.
            mode = Path(path).stat().st_mode
            if stat.S_ISDIR(mode):
                return  # QEMU makes a new file in it, without a name
            if not stat.S_ISREG(mode):
                raise NotSupported(f"{path!r} is no file: what it holds cannot be told")
            fd = os.open(path, (os.O_RDWR if shared else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # QEMU makes it
        except OSError as error:
            raise TargetError(
                error.errno or errno.EIO, "the memory file cannot be looked into", path
            ) from error
        self._stack.callback(os.close, fd)
        file = _RamFile(fd, path, parse_size(properties.get("offset", "0")), block.length)
        holds = file.has_data()
        if not shared:
            if holds:
                raise UsageError(
                    f"{path!r}, the memory file of block {block.name!r}, holds something, which "
                    "QEMU would leave where the snapshot has zeros: use another file, or "
                    "memory-backend-ram"
                )
            return
        _refuse_used(file, holds)
        if holds:
            self._to_clear.append(file)
            self.notes.append(f"what {path!r} held is replaced by the snapshot's memory")

    def clear(self) -> None:
        """Empty them: what is not loaded is to read as zeros. TargetError where that fails."""
        for file in self._to_clear:
            file.clear()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _files(
    command: CommandLine, snapshot: MappedRamSnapshot, mapped: Collection[str]
) -> Iterator[tuple[str, MappedRamBlock, dict[str, str]]]:
    """The files of blocks that the stream brings."""
    between_guests = memories_of(command, ("ivshmem",))  # others are meant to have them as well
    for _, properties in memory_backends(command):
        name, path = properties.get("id", ""), properties.get("mem-path")
        block = block_of(name, snapshot)
        if path is None or block is None or block.name in mapped or block.external:
            continue
        if name not in between_guests:
            yield os.fspath(Path(command.directory or "", path)), block, properties
    for option in command.all("readconfig"):
        with contextlib.suppress(OSError):
            file = Path(option.value or "")
            if file.is_file() and "mem-path" in file.read_text(errors="replace"):
                raise NotSupported(
                    f"{option} names a memory file; give it on the command line instead"
                )


def _refuse_used(file: _RamFile, holds: bool) -> None:
    """By anybody else: its guest would be overwritten."""
    lone = _is_lone(file.fd)
    if lone:
        return
    user = _user_of(file.fd, mapped_only=not holds)
    if user is not None:
        raise UsageError(
            f"{file.path!r} is memory that {user} uses, and loading would overwrite it: end that "
            "process, or give another mem-path"
        )
    if not holds:
        return  # there is nothing in it that could be lost
    if lone is False:
        raise UsageError(
            f"{file.path!r} holds something and another process has it open, and loading would "
            "overwrite it: give another mem-path"
        )
    raise NotSupported(
        f"whether another process uses {file.path!r} cannot be told here, and loading would "
        "overwrite what it holds: remove the file, or give another mem-path"
    )


def _is_lone(fd: int) -> bool | None:
    """Whether ``fd`` is the only open description of its file; None where the kernel won't tell.

    A write lease is given for no other, whoever holds it; a mapping holds one.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return False if error.errno == errno.EAGAIN else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # before QEMU would have to wait for it
    return True


def _user_of(fd: int, *, mapped_only: bool) -> str | None:
    """Another process that has the file mapped or open, as far as this one may see."""
    # A restore has no time for what it seldom needs: this imports asyncio.
    from pyqmigrate.vm.guest.process import read_mappings

    info = os.fstat(fd)
    identity = (info.st_dev, info.st_ino)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            used = any(
                m.shared and (m.device, m.inode) == identity for m in read_mappings(int(entry.name))
            )
            if used or (not mapped_only and _has_open(entry, info)):
                name = (entry / "comm").read_text(errors="replace").strip()
                return f"process {entry.name} ({name})"
    return None


def _has_open(process: Path, info: os.stat_result) -> bool:
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            if os.path.samestat(descriptor.stat(), info):
                return True
    return False
