"""Memory files of a QEMU into which a snapshot is loaded.

QEMU loads into such a file without clearing it: it overwrites the pages that the snapshot contains,
even if another guest runs on them, and leaves the others, which should be zero, as they are. So a
file in use is refused. One with old data is cleared once QEMU has started, before the load.
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

from pyqmigrate.errors import NotSupported, TargetError, UsageError, target_error
from pyqmigrate.format.uri import parse_size
from pyqmigrate.io.holes import next_data
from pyqmigrate.snapshot.base import Block, Snapshot
from pyqmigrate.vm.incoming.ram_mapping import block_of
from pyqmigrate.vm.qemu.command_line import CommandLine, Option, is_on
from pyqmigrate.vm.qemu.memory_options import memories_of, memory_backends

__all__ = ["RamFiles", "loadable"]


def loadable(command: CommandLine, snapshot: Snapshot) -> tuple[CommandLine, list[str]]:
    """Return ``command`` for a QEMU that loads all of its memory, and notes.

    Memory must not be written before the load, so ``prealloc`` is left out. So is ``-mem-path`` of a
    file with data: machines map it privately and would show that data.
    """
    notes = []
    if command.has("mem-prealloc"):
        command = command.without("mem-prealloc")
        notes.append("-mem-prealloc is left out: memory is allocated by the load")
    changes: dict[Option, Option] = {}
    devices = memories_of(command)
    for option, properties in memory_backends(command):
        name = properties.get("id", "")
        if is_on(properties.get("prealloc")) and name not in devices:
            changes[option] = option.with_property("prealloc", False)
            notes.append(f"prealloc=on of {name!r} is off: memory is allocated by the load")
    command = command.replaced(changes)
    paths = command.all("mem-path")
    if paths and _has_data(Path(paths[-1].value or "")):
        command = command.without("mem-path")
        notes.append(
            f"{paths[-1]} is left out: the file's old data would appear in the guest's memory"
        )
    return command, notes


def _has_data(path: Path) -> bool:
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
            raise OSError(errno.EOPNOTSUPP, "the file still has data")
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None) or errno.EINVAL
            raise TargetError(
                number, "cannot clear this memory file: remove it", self.path
            ) from error


class RamFiles:
    """The memory files of one QEMU that will be started; a context manager.

    ``notes`` name those that :meth:`clear` will clear.
    """

    def __init__(
        self, command: CommandLine, snapshot: Snapshot, mapped: Collection[str] = ()
    ) -> None:
        """Check the files of ``command``; ``mapped`` are blocks whose memory is not loaded.

        Raises UsageError for a file that another process uses, or that has data and is mapped
        privately; NotSupported if that cannot be determined. Blocks.
        """
        self.notes: list[str] = []
        self._to_clear: list[_RamFile] = []
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for path, block, properties in _files(command, snapshot, mapped):
                self._check(path, block, properties)
            undo.pop_all()

    def _check(self, path: str, block: Block, properties: dict[str, str]) -> None:
        shared = is_on(properties.get("share"))
        try:
            # Opening a pipe or a device may block or have effects.
            mode = Path(path).stat().st_mode
            if stat.S_ISDIR(mode):
                return  # QEMU creates an unnamed file in it
            if not stat.S_ISREG(mode):
                raise NotSupported(f"{path!r} is not a regular file, so it cannot be inspected")
            fd = os.open(path, (os.O_RDWR if shared else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # QEMU creates it
        except OSError as error:
            raise target_error(error, "cannot inspect the memory file", path) from error
        self._stack.callback(os.close, fd)
        file = _RamFile(fd, path, parse_size(properties.get("offset", "0")), block.length)
        has_data = file.has_data()
        if not shared:
            if has_data:
                raise UsageError(
                    f"{path!r}, the memory file of block {block.name!r}, contains data, which would "
                    "remain where the snapshot has zeros: use another file, or "
                    "memory-backend-ram"
                )
            return
        _refuse_used(file, has_data)
        if has_data:
            self._to_clear.append(file)
            self.notes.append(f"the data in {path!r} is replaced by the snapshot's memory")

    def clear(self) -> None:
        """Clear the files: what is not loaded must read as zeros. Raises TargetError."""
        for file in self._to_clear:
            file.clear()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _files(
    command: CommandLine, snapshot: Snapshot, mapped: Collection[str]
) -> Iterator[tuple[str, Block, dict[str, str]]]:
    """Generate the files of blocks whose memory is in the stream."""
    shared = memories_of(command, ("ivshmem",))  # meant to be shared with other processes
    for _, properties in memory_backends(command):
        name, path = properties.get("id", ""), properties.get("mem-path")
        block = block_of(name, snapshot)
        if path is None or block is None or block.name in mapped or block.external:
            continue
        if name not in shared:
            yield os.fspath(Path(command.directory or "", path)), block, properties
    for option in command.all("readconfig"):
        with contextlib.suppress(OSError):
            file = Path(option.value or "")
            if file.is_file() and "mem-path" in file.read_text(errors="replace"):
                raise NotSupported(
                    f"{option} names a memory file; give it on the command line instead"
                )


def _refuse_used(file: _RamFile, has_data: bool) -> None:
    """Raise UsageError if another process uses the file: the load would overwrite its memory."""
    only = _is_only_description(file.fd)
    if only:
        return
    user = _user_of(file.fd, mapped_only=not has_data)
    if user is not None:
        raise UsageError(
            f"{file.path!r} is memory that {user} uses, and the load would overwrite it: end that "
            "process, or give another mem-path"
        )
    if not has_data:
        return
    if only is False:
        raise UsageError(
            f"{file.path!r} contains data that the load would overwrite, and another process has it "
            "open: give another mem-path"
        )
    raise NotSupported(
        f"cannot determine whether another process uses {file.path!r}, and the load would overwrite "
        "its data: remove the file, or give another mem-path"
    )


def _is_only_description(fd: int) -> bool | None:
    """Return whether ``fd`` is the only open description of its file; None if that is unknown.

    The kernel grants a write lease only then. A mapping counts as an open description.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return False if error.errno == errno.EAGAIN else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # before QEMU would have to wait for it
    return True


def _user_of(fd: int, *, mapped_only: bool) -> str | None:
    """Return another process that has the file mapped or open, if it is visible to this one."""
    # Imports asyncio, which a restore should not load before QEMU has started.
    from pyqmigrate.vm.guest.process import read_mappings

    info = os.fstat(fd)
    identity = (info.st_dev, info.st_ino)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            used = any(
                mapping.shared and (mapping.device, mapping.inode) == identity
                for mapping in read_mappings(int(entry.name))
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
