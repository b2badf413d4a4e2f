"""The file that a save writes, or a load reads: which descriptors, and when it gets its name.

With direct I/O there are two descriptors with open file descriptions of their own: a buffered one
for everything small, and one with ``O_DIRECT`` for pages. A path is opened and closed here;
descriptors that are handed in are borrowed.

A new file is published in one of two ways:

- a path without an offset is written as an unnamed file in the same directory, made durable,
  then linked and renamed over the name: whoever opens the name finds the old file or a whole new
  one, and a process that is killed leaves nothing;
- with an offset, with descriptors, or when an existing file is overwritten (``reuse``), the four
  bytes of the magic are zero until everything else is durable, and are written last.

A seal (:mod:`pyqmigrate.format.seal`) that lies beside a path is removed before the file there
changes, or another one takes its name.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pyqmigrate import _core
from pyqmigrate.errors import DirectIORefused, NotDurable, TargetError, UsageError, target_error
from pyqmigrate.format.seal import SUFFIX, is_seal
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX, PAGES_ALIGNMENT
from pyqmigrate.format.uri import parse_file_uri
from pyqmigrate.io.in_use import InUse, Named, refuse_in_use
from pyqmigrate.io.new_file import NewFile
from pyqmigrate.io.own_files import FileKind, open_directory, remove
from pyqmigrate.io.place import absolute, check_name_fits, resolve_symlink, sync_directory

__all__ = [
    "Descriptors",
    "Direct",
    "DirectIO",
    "InputFile",
    "OutputFile",
    "SEAL",
    "seal_path",
    "Target",
    "core_file",
    "file_size",
    "find_direct",
    "stream_offset",
    "target_path",
]

SEAL = FileKind("seal", is_seal, may_be_empty=False)
_MODE = 0o600
_FALLBACK_ALIGN = 4096
_LARGEST_ALIGN = 65536


class DirectIO(enum.StrEnum):
    """Whether pages bypass the page cache.

    ``on``: yes, or :class:`~pyqmigrate.errors.DirectIORefused`. ``off``: no. ``auto``: where the
    file system tells an alignment and a real aligned write works.
    """

    ON = "on"
    OFF = "off"
    AUTO = "auto"


@dataclass(frozen=True)
class Descriptors:
    """Open descriptors instead of a path; they stay the caller's and are never closed here.

    ``buffered`` is without ``O_DIRECT``, ``direct`` (None: no direct I/O) a second ``open()`` of
    the same file with it. The stream starts at ``offset`` bytes; where the descriptors stand does
    not matter and is not changed. ``scattered`` lets the two be different files, as QEMU does:
    pages are in the one, all else in the other.
    """

    buffered: int
    direct: int | None = None
    offset: int = 0
    scattered: bool = False


Target: TypeAlias = str | os.PathLike[str] | Descriptors


@dataclass(frozen=True)
class Direct:
    """A descriptor with O_DIRECT, what it demands (bytes), and what was found out."""

    fd: int
    mem_align: int
    off_align: int
    reason: str


def _split(target: Target) -> tuple[str, int]:
    """``(path, offset)``; for descriptors a path that names them in messages."""
    if isinstance(target, Descriptors):
        path, offset = f"<descriptor {target.buffered}>", target.offset
    elif isinstance(target, str) and target.startswith("file:"):
        path, offset = parse_file_uri(target)
    else:
        try:
            path, offset = os.fsdecode(target), 0
        except TypeError:
            raise UsageError(
                f"a target is a path, a file: URI or Descriptors, not {type(target).__name__}"
            ) from None
    if not isinstance(offset, int) or not 0 <= offset <= OFFSET_MAX:
        raise UsageError(f"offset {offset} is not a file position")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or b"\0" in encoded:
        raise UsageError(f"{path!r} is not the path of a file")
    return path, offset


def _refused(error: OSError, what: str, name: str, position: int | None = None) -> TargetError:
    return target_error(error, what, name, position=position)


def _check_borrowed(given: Descriptors, *, writing: bool) -> None:
    """UsageError unless the descriptors are what a save (or load) can work with."""
    verb, wanted = ("write", "O_WRONLY") if writing else ("read", "O_RDONLY")
    useless = os.O_RDONLY if writing else os.O_WRONLY
    infos = []
    for fd, direct in ((given.buffered, False), (given.direct, True)):
        if fd is None:
            continue
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            info = os.fstat(fd)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"descriptor {fd} cannot be used: {error}") from None
        device = stat.S_ISBLK(info.st_mode) and not writing
        if not (stat.S_ISREG(info.st_mode) or device):
            raise UsageError(f"descriptor {fd} is not a regular file; snapshots need one")
        if flags & os.O_ACCMODE == useless:
            raise UsageError(f"descriptor {fd} cannot {verb}; open it with {wanted}")
        if bool(flags & os.O_DIRECT) != direct:
            has = "has" if flags & os.O_DIRECT else "lacks"
            raise UsageError(
                f"descriptor {fd} {has} O_DIRECT; pass two separate open()s of the file, "
                "buffered without it and direct with it (a dup() shares its flags)"
            )
        if writing and flags & os.O_APPEND:
            raise UsageError(f"descriptor {fd} has O_APPEND, which ignores file positions")
        infos.append((info.st_dev, info.st_ino))
    if len(set(infos)) > 1 and not given.scattered:
        raise UsageError(
            f"descriptors {given.buffered} and {given.direct} are different files; "
            "open the same one twice"
        )


def seal_path(snapshot: str | os.PathLike[str]) -> Path:
    """Where the seal of a file is, an absolute path: beside it, or beside what a symbolic link
    leads to."""
    path = resolve_symlink(snapshot)
    return path.with_name(path.name + SUFFIX)


def _alignment(fd: int, setting: DirectIO) -> tuple[int, int] | str:
    """What direct I/O on this file demands, or why it is not to be had."""
    mem, off = _core.ffi.new("uint32_t *"), _core.ffi.new("uint32_t *")
    rc = _core.lib.qm_direct_align(fd, mem, off)
    if rc == 0:
        # Writing part of a file system's block costs it a read, or a wait for all other writers.
        block = os.fstat(fd).st_blksize
        if block > _LARGEST_ALIGN or block & (block - 1):
            block = _FALLBACK_ALIGN
        return int(mem[0]), max(int(off[0]), block)
    if setting is DirectIO.ON:
        return _FALLBACK_ALIGN, _FALLBACK_ALIGN
    if rc == -errno.ENOSYS:
        return "the kernel reports no alignment for direct I/O"
    return "the file system reports no alignment for direct I/O"


def find_direct(
    fd: int, given: int | None, setting: DirectIO, name: str, *, write_at: int | None
) -> tuple[Direct | None, str]:
    """Open (or take) the direct descriptor of the file ``fd`` and try it. ``write_at``: where a
    unit may be written, None for a file that is only read.

    Returns it, whose ``fd`` the caller closes, or None and why not; raises DirectIORefused where it
    is demanded.
    """
    if setting is DirectIO.OFF:
        return None, "switched off"
    alignment = _alignment(fd, setting)
    if isinstance(alignment, str):
        return None, alignment
    mem_align, off_align = alignment
    flags = (os.O_WRONLY if write_at is not None else os.O_RDONLY) | os.O_DIRECT | os.O_CLOEXEC
    what, direct = "open with O_DIRECT", -1
    try:
        direct = os.open(f"/proc/self/fd/{fd}", flags) if given is None else given
        what = "aligned direct write" if write_at is not None else "aligned direct read"
        with mmap.mmap(-1, _LARGEST_ALIGN) as unit, memoryview(unit)[:off_align] as view:
            if write_at is None:
                os.preadv(direct, [view], 0)
            else:
                at = -(-write_at // off_align) * off_align
                if os.pwritev(direct, [view], at) != off_align:
                    raise OSError(errno.EIO, "short write")
    except OSError as error:
        if given is None and direct >= 0:
            os.close(direct)
        if setting is DirectIO.ON:
            raise DirectIORefused(
                error.errno or errno.EINVAL, f"direct I/O is not possible here ({what})", name
            ) from error
        return None, f"{what} failed: {error.strerror}"
    reason = f"works here: addresses aligned to {mem_align}, positions to {off_align} bytes"
    return Direct(direct, mem_align, off_align, reason), reason


def core_file(fd: int, direct: Direct | None) -> Any:
    """The two descriptors as the core's ``struct qm_file *``; ``fd`` -1: nothing is written."""
    file = _core.ffi.new("struct qm_file *")
    file.fd = fd
    file.fd_direct = direct.fd if direct else -1
    file.mem_align = direct.mem_align if direct else 1
    file.off_align = direct.off_align if direct else 1
    return file


def target_path(target: str | os.PathLike[str]) -> str:
    """The path in a target, without ``file:`` and offset."""
    return _split(target)[0]


def file_size(fd: int) -> int:
    """Length of a file or block device, bytes. The position of ``fd`` is afterwards as before."""
    info = os.fstat(fd)
    if not stat.S_ISBLK(info.st_mode):
        return info.st_size
    position = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.lseek(fd, position, os.SEEK_SET)


def stream_offset(target: Target) -> int:
    """Where in its file the stream of a target starts, bytes."""
    return _split(target)[1]


class OutputFile:
    """A file being written. Use :meth:`open`, then exactly one of publish and abort.

    ``fd`` is buffered; ``direct`` is None without direct I/O, and ``direct_io_reason`` says why
    or what it demands. ``offset`` is where the stream starts. ``forward`` says that bytes can only
    be written one after another (:mod:`pyqmigrate.io.forward_output`). ``place`` is the absolute
    path of the file, links of its last part followed; None with descriptors. ``published`` says
    whether it has become a snapshot, also where :meth:`publish` failed after that.
    """

    forward = False

    def __init__(self, target: Target, *, reuse: bool, prefix: bytes = b"") -> None:
        self.name, self.offset = _split(target)
        if prefix and (self.offset or reuse or isinstance(target, Descriptors)):
            raise UsageError("what precedes a stream goes into a new file: the target is a path")
        self._changes_in_place = bool(self.offset or reuse)
        self._prefix = prefix
        if prefix:
            self.offset = len(prefix)
        self.reuse = reuse
        self.fd = -1
        self.direct: Direct | None = None
        self.direct_io_reason = ""
        self._borrowed = isinstance(target, Descriptors)
        self._given_direct = target.direct if isinstance(target, Descriptors) else None
        self._dir_fd = -1
        self.place: Path | None = None
        self._path = Path()  # absolute, with its links
        self.published = False
        self._new: NewFile | None = None
        self._target = target
        self._in_use: InUse = {}
        self._may_be_new = False
        self._mark = os.urandom(8).hex()

    @property
    def in_place(self) -> bool:
        """Whether the bytes go where readers may already look: the magic is written last."""
        return self._new is None

    @classmethod
    def open(
        cls,
        target: Target,
        direct_io: DirectIO,
        *,
        reuse: bool = False,
        in_use: InUse | None = None,
        beside: Collection[Named] = (),
        mark: str | None = None,
        prefix: bytes = b"",
    ) -> OutputFile:
        """Open the target and find out about direct I/O. ``prefix`` is what a new file has before
        its stream.

        From here on an existing file that is written in place is not a snapshot any more. Before
        that, and before a seal is removed, the target is compared with ``in_use``
        (:mod:`pyqmigrate.io.in_use`), whether it is to be written in place or to be replaced; so
        are the seal of a path and ``beside``, other files that the caller is going to write. A
        name that an unfinished file has to have ends in ``.MARK.partial``; without ``mark`` in a
        random one. Raises UsageError for a file that is in use and for descriptors that do not
        fit, TargetError when the system refuses.
        """
        self = cls(target, reuse=reuse, prefix=prefix)
        self._in_use = in_use or {}
        self._mark = mark or self._mark
        if self._borrowed and self._given_direct is None and direct_io is DirectIO.ON:
            raise UsageError(
                'direct_io="on" with Descriptors needs a second descriptor, opened with O_DIRECT'
            )
        try:
            refuse_in_use(beside, self._in_use)
            self._open()
            self._open_direct(direct_io)
        except BaseException:
            self.abort()
            raise
        return self

    def _open(self) -> None:
        if isinstance(self._target, Descriptors):
            _check_borrowed(self._target, writing=True)
            fds = (self._target.buffered, self._target.direct)
            refuse_in_use([fd for fd in fds if fd is not None], self._in_use)
            self.fd = self._target.buffered
            self._invalidate()
            return
        self._path = absolute(self.name)
        self.place = place = resolve_symlink(self.name)
        exists = self._check_what_is_there()
        if self._changes_in_place:
            self._may_be_new = not exists
            with self._refusing("cannot open for writing"):
                self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
            # What was looked at and what was opened can be two files.
            self._refuse_special(os.fstat(self.fd).st_mode)
            refuse_in_use(self.fd, self._in_use)
            self._check_name()
            self._check_links()
            self._lock()
            self._remove_seal()
            self._invalidate()
            return
        check_name_fits(place)
        with self._refusing("cannot write the file"):
            self._dir_fd = open_directory(place)
        with self._refusing("cannot create a file in the directory of"):
            self._new = NewFile(self._dir_fd, place.name, self._mark)
            self.fd = self._new.fd

    def _check_what_is_there(self) -> bool:
        """Whether there is a file under the name; refuse one that must not be changed."""
        assert self.place is not None
        refuse_in_use([self._path, self.seal], self._in_use)
        with self._refusing("cannot write the file"):
            try:
                info = self._path.stat()
            except FileNotFoundError:
                return False
            self._refuse_special(info.st_mode)
            if not self._changes_in_place and not _is_same(self.place, info):
                raise TargetError(
                    errno.ESTALE,
                    "cannot be replaced: its links lead to another file than they "
                    "name; name the file itself",
                    self.name,
                )
        return True

    @property
    def seal(self) -> Path:
        """The seal that a file under this name may have."""
        assert self.place is not None
        return self.place.with_name(self.place.name + SUFFIX)

    def _lock(self) -> None:
        """A guest that was restored from the file instantly holds a shared lock on it."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TargetError(
                errno.EBUSY,
                "cannot be changed in place: a guest runs from it, or somebody writes "
                "it; save to another name, which may replace this one",
                self.name,
            ) from error
        except OSError:
            pass  # a file system without locks

    def _refuse_special(self, mode: int) -> None:
        if stat.S_ISDIR(mode):
            raise TargetError(errno.EISDIR, "cannot write a snapshot", self.name)
        if not stat.S_ISREG(mode):
            raise UsageError(f"{self.name!r} is not a regular file; snapshots need one")

    def _invalidate(self) -> None:
        """Take the magic away before anything else changes."""
        info = os.fstat(self.fd)
        with self._refusing("cannot truncate"):
            if not self.reuse:
                os.ftruncate(self.fd, self.offset)
            elif info.st_size > self.offset:
                os.pwrite(self.fd, bytes(4), self.offset)
                os.fdatasync(self.fd)

    def _open_direct(self, setting: DirectIO) -> None:
        if self._borrowed and self._given_direct is None:
            self.direct_io_reason = (
                "switched off" if setting is DirectIO.OFF else "no direct descriptor was given"
            )
            return
        # Where pages will be: what is written there now is overwritten or cut off again.
        write_at = -(-(self.offset + 1) // PAGES_ALIGNMENT) * PAGES_ALIGNMENT
        self.direct, self.direct_io_reason = find_direct(
            self.fd, self._given_direct, setting, self.name, write_at=write_at
        )

    def set_size(self, size: int) -> None:
        """Give the file its final size (bytes), all of it a hole unless it is being reused."""
        with self._refusing(f"cannot be made {size} bytes long"):
            if not self.reuse:
                os.ftruncate(self.fd, self.offset)
            os.ftruncate(self.fd, size)

    @contextlib.contextmanager
    def opened_for_reading(self) -> Iterator[int]:
        """A descriptor of our own to read back and punch what was written."""
        with self._refusing("cannot read back what was written"):
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def free_bytes(self) -> int | None:
        """Bytes that can still be allocated here, with ``reuse`` what the file holds included.

        None where the file system knows no limit (a memfd).
        """
        with self._refusing("cannot tell the free space"):
            info = os.fstatvfs(self.fd)
            if info.f_blocks == 0:
                return None
            blocks = info.f_bfree if os.geteuid() == 0 else info.f_bavail
            own = max(0, self.allocated_bytes() - self.offset) if self.reuse else 0
            return blocks * info.f_frsize + own

    def allocated_bytes(self) -> int:
        """Bytes of disk that the file holds."""
        return os.fstat(self.fd).st_blocks * 512

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data`` at ``offset`` through the buffered descriptor."""
        with memoryview(data).cast("B") as view:
            done = 0
            while done < len(view):
                try:
                    done += os.pwrite(self.fd, view[done:], offset + done)
                except OSError as error:
                    raise _refused(error, "cannot write", self.name, offset + done) from error

    def flush(self) -> None:
        """Write what the page cache has of the file to disk; it stays unfinished."""
        with self._refusing("cannot make durable"):
            os.fdatasync(self.fd)

    def publish(self, magic: bytes, check: Callable[[], None]) -> None:
        """Make the file durable and a snapshot: ``magic`` is what its first four bytes will be.

        ``check`` is called when all is durable and nobody has seen it yet; it may raise. NotDurable
        where it has become a snapshot, and making its name or magic durable failed.
        """
        with self._refusing("cannot make durable"):
            if not self.in_place:
                self.write_at(0, self._prefix)  # empty where the stream starts at 0
                self.write_at(self.offset, magic)
            os.fsync(self.fd)
        check()
        if self._new is None:
            self._check_name()
            self.write_at(self.offset, magic)
        else:
            self._check_replaced(self._new)
            self._remove_seal()
            with self._refusing("cannot give the finished file its name"):
                self._new.give_name()
        self.published = True
        try:
            if self._new is not None:
                os.fsync(self._dir_fd)
            else:
                os.fdatasync(self.fd)
                if self._may_be_new and self.place is not None:
                    sync_directory(self.place)
        except OSError as error:
            raise NotDurable(error.errno or errno.EIO, self.name) from error
        if self._new is None:
            self._check_name()

    def _check_name(self) -> None:
        """Whether the name of a file that is written in place still leads to it."""
        if self._borrowed:
            return
        with self._refusing("cannot look at the name of"):
            if _is_same(self._path, os.fstat(self.fd), follow=True):
                return
        raise TargetError(
            errno.ESTALE,
            "was renamed, replaced or removed while it was written in place: what "
            "was written is not under this name",
            self.name,
        )

    def _check_links(self) -> None:
        """Whether the kernel followed the links that were looked at, and no other ones."""
        assert self.place is not None
        with self._refusing("cannot look at the links of"):
            # Where they lead to a file without a name (/proc/self/fd), nothing is at the place.
            if os.path.lexists(self.place) and not _is_same(self.place, os.fstat(self.fd)):
                raise TargetError(errno.ESTALE, "was replaced while it was opened", self.name)

    def _check_replaced(self, new: NewFile) -> None:
        """What has the name now may have come during the save."""
        assert self.place is not None
        refuse_in_use(self.place, self._in_use)
        with self._refusing("cannot replace"), contextlib.suppress(FileNotFoundError):
            mode = os.stat(new.name, dir_fd=self._dir_fd, follow_symlinks=False).st_mode
            if not stat.S_ISLNK(mode):
                self._refuse_special(mode)

    def _remove_seal(self) -> None:
        """The seal of the file that is replaced would call the new one damaged. In place it is
        gone for good before the file changes."""
        with self._refusing("cannot remove the seal of what is replaced"):
            if self._new is not None:
                remove(self.seal.name, SEAL, self._dir_fd)
            elif remove(os.fspath(self.seal), SEAL):
                sync_directory(self.seal)

    def abort(self) -> None:
        """Drop an unpublished file; close what is ours. Can be called again, also after publish."""
        self.close()

    def close(self) -> None:
        """Close what was opened here. May be repeated."""
        if self.direct is not None and self._given_direct is None:
            os.close(self.direct.fd)
        self.direct = None
        if self._new is not None:
            self._new.close()
        elif self.fd >= 0 and not self._borrowed:
            os.close(self.fd)
        if self._dir_fd >= 0:
            os.close(self._dir_fd)
        self.fd = self._dir_fd = -1

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (TargetError, UsageError):
            raise
        except OSError as error:
            raise _refused(error, what, self.name) from error


def _is_same(path: Path, info: os.stat_result, *, follow: bool = False) -> bool:
    """Whether the file with ``info`` is under this path. Raises OSError."""
    try:
        return os.path.samestat(path.stat(follow_symlinks=follow), info)
    except FileNotFoundError:
        return False


class InputFile:
    """A file or block device being read: ``fd`` is an open file description of our own.

    ``is_device`` says that it is a block device, which records no time of change. ``passing`` says
    that it is neither, and can be read front to back only (:mod:`pyqmigrate.io.pipe`).
    ``place`` is the absolute path under which the file was opened, None with descriptors. Raises
    TargetError when it cannot be opened, UsageError for descriptors that do not fit.
    """

    passing = False
    is_device = False
    place: Path | None

    def __init__(self, target: Target) -> None:
        self.name, self.offset = _split(target)
        self.fd = -1
        self._given_direct: int | None = None
        self._borrowed = isinstance(target, Descriptors)
        self.place = None if self._borrowed else absolute(self.name)
        self.is_duplicate = False  # of the caller's description, with its position and its locks
        if isinstance(target, Descriptors):
            _check_borrowed(target, writing=False)
            self._given_direct = target.direct
            try:
                # Looking for holes moves the position, and the caller's is not ours to move.
                self.fd = os.open(f"/proc/self/fd/{target.buffered}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self.fd = fcntl.fcntl(target.buffered, fcntl.F_DUPFD_CLOEXEC, 3)
                self.is_duplicate = True
        else:
            try:
                # O_NONBLOCK: to open a FIFO must not wait for a writer.
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                self.fd = os.open(self.name if self.place is None else self.place, flags)
            except OSError as error:
                raise _refused(error, "cannot open", self.name) from error
        info = os.fstat(self.fd)
        if stat.S_ISDIR(info.st_mode):
            self.close()
            raise TargetError(errno.EISDIR, "cannot open", self.name)
        self.is_device = stat.S_ISBLK(info.st_mode)
        if not (stat.S_ISREG(info.st_mode) or self.is_device):
            self.close()
            raise UsageError(f"{self.name!r} is neither a regular file nor a block device")

    @property
    def size(self) -> int:
        """Length of the file or block device now, bytes."""
        return file_size(self.fd)

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes at ``offset``; fewer only at the end of the file."""
        parts, have = [], 0
        while have < length:
            try:
                part = os.pread(self.fd, length - have, offset + have)
            except OSError as error:
                raise _refused(error, "cannot read", self.name, offset + have) from error
            if not part:
                break
            parts.append(part)
            have += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def file_fd(self) -> int:
        """A descriptor of the file, whether or not the stream is what it holds."""
        return self.fd

    @property
    def file_size(self) -> int:
        """Length of the file, whether or not the stream is what it holds, bytes."""
        return self.size

    @property
    def repeatable(self) -> bool:
        """Whether it can be read more than once."""
        return True

    def rewind(self) -> None:
        """Make ready for another pass; UsageError where that cannot be."""

    def open_direct(self, setting: DirectIO) -> tuple[Direct | None, str]:
        """A direct descriptor for a load, or None and why not. Give it to close_direct."""
        if self._borrowed and self._given_direct is None:
            if setting is DirectIO.ON:
                raise UsageError(
                    'direct_io="on" with Descriptors needs a second descriptor, '
                    "opened with O_DIRECT"
                )
            return None, "no direct descriptor was given"
        return find_direct(self.fd, self._given_direct, setting, self.name, write_at=None)

    def close_direct(self, direct: Direct | None) -> None:
        """Close what open_direct opened; a borrowed descriptor stays open."""
        if direct is not None and self._given_direct is None:
            os.close(direct.fd)

    def allocated_bytes(self) -> int:
        """Bytes of disk that the file holds; of a block device, all of it."""
        return self.size if self.is_device else os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """May be repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
