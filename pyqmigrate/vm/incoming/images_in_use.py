"""Find disk images of a command line that another process writes to.

A restored guest writes to its disks. If the saved guest still runs, QEMU notices that only after the
load, and the new guest hangs. QEMU's ``file-posix`` driver marks an open image by locks on single
bytes: byte 100 + N is locked for permission N that it uses, byte 200 + N for permission N that it
does not share; permission 1 is to write. Other programs are found by their open descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyqmigrate.errors import UsageError
from pyqmigrate.format.qcow2 import BACKING_MAX, HEADER_SIZE, decode_header
from pyqmigrate.vm.incoming.shared_files import written_images
from pyqmigrate.vm.qemu.command_line import CommandLine, Option, is_on

__all__ = ["refuse_in_use"]

_WRITES, _WRITES_ALONE = 101, 201  # bytes of QEMU's locks
_GET_LOCK = getattr(fcntl, "F_OFD_GETLK", 36)  # not named by Python 3.11
_LOCK = struct.Struct("@hhqqi0q")  # struct flock: type, whence, start, length, pid
_CHAIN_MAX = 64  # backing files of one image that are checked


def refuse_in_use(command: CommandLine) -> None:
    """Raise UsageError if another process writes to a writable image or to one of its backing
    files. Images that cannot be inspected are left to QEMU.

    A device with ``share-rw=on`` shares its disk with other writers.
    """
    share = any(
        is_on(option.properties("driver").get("share-rw")) for option in command.all("device")
    )
    for name, option in written_images(command).items():
        for path in _chain(name):
            if path != name:
                used = _is_used(path, (_WRITES,))
            elif share:
                used = _is_used(path, (_WRITES_ALONE,))
            else:
                used = _is_used(path, (_WRITES, _WRITES_ALONE), without_locks=True)
            if used:
                raise UsageError(_refusal(path, name, option))


def _refusal(path: str, name: str, option: Option) -> str:
    user = _writer_of(path)
    image = repr(path) if path == name else f"{path!r}, a backing file of {name!r},"
    return (
        f"{image} is open for writing in {user or 'another process'} ({option}), perhaps the saved "
        "guest: end that process, or give this guest another disk"
    )


def _chain(path: str) -> Iterator[str]:
    """Generate the image and those backing files that are local files."""
    for _ in range(_CHAIN_MAX):
        yield path
        backing = _backing_file(path)
        if not backing or backing.startswith("json:") or "://" in backing:
            return
        path = os.path.realpath(Path(path).parent / backing.removeprefix("file:"))


def _backing_file(path: str) -> str:
    """Return a qcow2 image's backing file, as the image names it; empty for other images."""
    with contextlib.suppress(OSError):
        fd = _open(path)
        try:
            header = decode_header(os.pread(fd, HEADER_SIZE, 0))
            if header and header.backing_offset and header.backing_size <= BACKING_MAX:
                return os.fsdecode(os.pread(fd, header.backing_size, header.backing_offset))
        finally:
            os.close(fd)
    return ""


def _is_used(path: str, locks: Sequence[int], *, without_locks: bool = False) -> bool:
    """Return whether another process locks one of these bytes, or writes without a lock."""
    with contextlib.suppress(OSError):
        fd = _open(path)
        try:
            if any(_is_locked(fd, byte) for byte in locks):
                return True
            return without_locks and _has_writer(fd) and _writer_of(path) is not None
        finally:
            os.close(fd)
    return False


def _open(path: str) -> int:
    """Open a disk or a file; raise OSError for all else: opening a pipe may wake its other end."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK), path)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _is_locked(fd: int, byte: int) -> bool:
    asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind = _LOCK.unpack(fcntl.fcntl(fd, _GET_LOCK, asked))[0]
    return bool(kind != fcntl.F_UNLCK)


def _has_writer(fd: int) -> bool:
    """Return whether a file is open for writing; False if the kernel does not report it.

    The kernel grants a read lease only if no process has the file open for writing.
    """
    try:
        fcntl.fcntl(
            fd, fcntl.F_SETSIG, signal.SIGURG
        )  # a signal that is ignored by default, if the file is opened now
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _writer_of(path: str) -> str | None:
    """Return another process that has the file open for writing, if it is visible to this one."""
    wanted = Path(path).stat()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for descriptor in (entry / "fd").iterdir():
                if _writes_to(entry, descriptor, wanted):
                    name = (entry / "comm").read_text(errors="replace").strip()
                    return f"process {entry.name} ({name})"
    return None


def _writes_to(process: Path, descriptor: Path, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        if os.path.samestat(descriptor.stat(), wanted):
            text = (process / "fdinfo" / descriptor.name).read_text()
            flags = next(line for line in text.splitlines() if line.startswith("flags:"))
            return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False
