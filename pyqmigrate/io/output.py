"""The file that a save writes, and when it gets its name.

With direct I/O there are two descriptors with open file descriptions of their own: a buffered one
for everything small, and one with ``O_DIRECT`` for pages. A path is opened and closed here;
descriptors that are handed in are borrowed.

A new file is published in one of two ways:

- a path without an offset is written as an unnamed file in the same directory, made durable,
  then linked and renamed over the name: a reader finds the old file or a complete new one, and a
  process that is killed leaves nothing;
- with an offset, with descriptors, or when an existing file is overwritten (``reuse``), the four
  bytes of the magic are zero until everything else is durable, and are written last.

A seal (:mod:`pyqmigrate.format.seal`) beside the path is removed before the file there changes or
is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pyqmigrate.errors import NotDurable, TargetError, UsageError, target_error
from pyqmigrate.format.seal import SUFFIX
from pyqmigrate.format.stream.mapped_ram import PAGES_ALIGNMENT
from pyqmigrate.io.direct_io import Direct, DirectIO, find_direct
from pyqmigrate.io.enclosing_store import refuse_in_store
from pyqmigrate.io.free_space import free_bytes
from pyqmigrate.io.in_use import InUse, Named, refuse_in_use
from pyqmigrate.io.lock import lock_file
from pyqmigrate.io.new_file import NewFile
from pyqmigrate.io.own_files import open_directory, remove
from pyqmigrate.io.place import absolute, check_name_fits, resolve_symlink, sync_directory
from pyqmigrate.io.seal_file import SEAL
from pyqmigrate.io.target import Descriptors, Target, check_borrowed, split_target

__all__ = ["OutputFile"]

_MODE = 0o600
_PREFIX_MAGIC = 8  # bytes at the start of a prefix that are written last


class OutputFile:
    """A file being written. Use :meth:`open`, then exactly one of publish and abort.

    ``fd`` is buffered; ``direct`` is None without direct I/O, and ``direct_io_reason`` says why, or
    what alignment it needs. ``offset`` is where the stream starts. ``forward`` says that bytes can
    only be written front to back (:mod:`pyqmigrate.io.forward_output`). ``place`` is the absolute
    path of the file, links of its last part followed; None with descriptors. ``published`` says
    whether it has become a snapshot, also if :meth:`publish` failed after that.
    """

    forward = False

    def __init__(
        self, target: Target, *, reuse: bool, prefix: bytes = b"", stream_offset: int | None = None
    ) -> None:
        self.name, self.offset = split_target(target)
        borrowed = isinstance(target, Descriptors) and stream_offset is None
        if prefix and (self.offset or reuse or borrowed):
            raise UsageError("a header before the stream needs a new file: give a path as target")
        self._changes_in_place = bool(self.offset or reuse)
        self.prefix = prefix
        self._kept = self.offset  # bytes at the start of an existing file that do not change
        if prefix:
            self.offset = len(prefix) if stream_offset is None else stream_offset
            self._kept = 0
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
        """Whether the bytes go into a file that has its name already: the magic is written last."""
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
        stream_offset: int | None = None,
    ) -> OutputFile:
        """Open the target and try direct I/O. ``prefix`` is what a new file has before its stream.

        With ``stream_offset`` the stream starts there, the prefix has a magic of 8 bytes, and can
        change until :meth:`publish`; descriptors are accepted too, which get its magic last.

        After this an existing file that is written in place is not a snapshot any more. Before
        that, and before a seal is removed, an existing file is refused if it is the base of increments
        beside it (:mod:`pyqmigrate.io.increments_of`), and the target is compared with ``in_use``
        (:mod:`pyqmigrate.io.in_use`), whether it will be written in place or replaced; so are the
        seal of a path and ``beside``, other files that the caller will write. If an unfinished file
        needs a name, that ends in ``.MARK.partial``; without ``mark``, in a random one. Raises
        UsageError for a file that is in use, one in the directory of a store and descriptors that do
        not fit, TargetError when the system refuses.
        """
        self = cls(target, reuse=reuse, prefix=prefix, stream_offset=stream_offset)
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
            check_borrowed(self._target, writing=True)
            fds = (self._target.buffered, self._target.direct)
            refuse_in_use([fd for fd in fds if fd is not None], self._in_use)
            self.fd = self._target.buffered
            self._invalidate()
            return
        if "#" in self.name:
            from pyqmigrate.io.view import refuse_stored

            refuse_stored(
                self.name, "be written", "write a file, and add that one (pyqmigrate store add)"
            )
        refuse_in_store(self.name, "a file that is written")
        self._path = absolute(self.name)
        self.place = place = resolve_symlink(self.name)
        exists = self._check_what_is_there()
        if self._changes_in_place:
            self._may_be_new = not exists
            with self._refusing("cannot open for writing"):
                self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
            # The file can have been replaced since it was checked.
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
        """Return whether there is a file under the name; refuse one that must not be changed."""
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
                    "cannot be replaced: its links lead to another file than they name; give the "
                    "path of the file itself",
                    self.name,
                )
        _refuse_base(self.place)
        return True

    @property
    def seal(self) -> Path:
        """The path of the seal of a file under this name."""
        assert self.place is not None
        return self.place.with_name(self.place.name + SUFFIX)

    def _lock(self) -> None:
        """Lock the file: a guest that was restored from it instantly has a shared lock on it."""
        try:
            lock_file(self.fd, exclusive=True)
        except BlockingIOError as error:
            raise TargetError(
                errno.EBUSY,
                "cannot be changed in place: a guest runs from it, or another process writes "
                "it; save to another name, which may replace this one",
                self.name,
            ) from error
        except OSError as error:
            raise target_error(error, "cannot lock", self.name) from error

    def _refuse_special(self, mode: int) -> None:
        if stat.S_ISDIR(mode):
            raise TargetError(errno.EISDIR, "cannot write a snapshot", self.name)
        if not stat.S_ISREG(mode):
            raise UsageError(f"{self.name!r} is not a regular file; a snapshot needs one")

    def _invalidate(self) -> None:
        """Remove the magic before anything else changes."""
        info = os.fstat(self.fd)
        with self._refusing("cannot truncate"):
            if not self.reuse:
                os.ftruncate(self.fd, self._kept)
            elif info.st_size > self.offset:
                os.pwrite(self.fd, bytes(4), self.offset)
                os.fdatasync(self.fd)

    def _open_direct(self, setting: DirectIO) -> None:
        if self._borrowed and self._given_direct is None:
            self.direct_io_reason = (
                "switched off" if setting is DirectIO.OFF else "no direct descriptor was given"
            )
            return
        # Where pages will be: this write is overwritten or cut off later.
        write_at = -(-(self.offset + 1) // PAGES_ALIGNMENT) * PAGES_ALIGNMENT
        self.direct, self.direct_io_reason = find_direct(
            self.fd, self._given_direct, setting, self.name, write_at=write_at
        )

    def set_size(self, size: int) -> None:
        """Give the file its final size (bytes), as one hole unless it is being reused."""
        with self._refusing(f"cannot be made {size} bytes long"):
            if not self.reuse:
                os.ftruncate(self.fd, self._kept)
            os.ftruncate(self.fd, size)

    @contextlib.contextmanager
    def opened_for_reading(self) -> Iterator[int]:
        """Open a second description of the file, to read back and punch what was written."""
        with self._refusing("cannot read back what was written"):
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def free_bytes(self) -> int | None:
        """Return the bytes that can still be allocated, with ``reuse`` including those of the file.

        None if the file system has no limit (a memfd).
        """
        with self._refusing("cannot find the free space of"):
            free = free_bytes(self.fd)
            if free is None or not self.reuse:
                return free
            return free + max(0, self.allocated_bytes() - self.offset)

    def allocated_bytes(self) -> int:
        """Return the bytes of disk that the file holds."""
        return os.fstat(self.fd).st_blocks * 512

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data`` at ``offset`` through the buffered descriptor."""
        with memoryview(data).cast("B") as view:
            done = 0
            while done < len(view):
                try:
                    done += os.pwrite(self.fd, view[done:], offset + done)
                except OSError as error:
                    raise target_error(
                        error, "cannot write", self.name, position=offset + done
                    ) from error

    def flush(self) -> None:
        """Write the dirty pages of the file to disk; it stays unfinished."""
        with self._refusing("cannot make durable"):
            os.fdatasync(self.fd)

    def publish(self, magic: bytes, check: Callable[[], None]) -> None:
        """Make the file durable and a snapshot: ``magic`` becomes its first four bytes.

        ``check`` is called when everything is durable and not visible yet; it may raise. Raises
        NotDurable if the file has become a snapshot, but making its name or magic durable failed.
        """
        with self._refusing("cannot make durable"):
            if not self.in_place:
                self.write_at(0, self.prefix)  # empty where the stream starts at 0
                self.write_at(self.offset, magic)
            elif self.prefix:
                self.write_at(_PREFIX_MAGIC, self.prefix[_PREFIX_MAGIC:])
            os.fsync(self.fd)
        check()
        if self._new is None:
            self._check_name()
            self.write_at(self.offset, magic)
            self.write_at(0, self.prefix[:_PREFIX_MAGIC])
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
        """Check that the name of a file that is written in place still leads to it."""
        if self._borrowed:
            return
        with self._refusing("cannot check the name of"):
            if _is_same(self._path, os.fstat(self.fd), follow=True):
                return
        raise TargetError(
            errno.ESTALE,
            "was renamed, replaced or removed while it was written in place: the snapshot is not "
            "under this name",
            self.name,
        )

    def _check_links(self) -> None:
        """Check that the kernel followed the links that were checked."""
        assert self.place is not None
        with self._refusing("cannot check the links of"):
            # If they lead to a file without a name (/proc/self/fd), nothing is at the place.
            if os.path.lexists(self.place) and not _is_same(self.place, os.fstat(self.fd)):
                raise TargetError(errno.ESTALE, "was replaced while it was opened", self.name)

    def _check_replaced(self, new: NewFile) -> None:
        """Check the file that is to be replaced: it, or an increment of it, may have been created
        during the save."""
        assert self.place is not None
        refuse_in_use(self.place, self._in_use)
        with self._refusing("cannot replace"), contextlib.suppress(FileNotFoundError):
            mode = os.stat(new.name, dir_fd=self._dir_fd, follow_symlinks=False).st_mode
            if not stat.S_ISLNK(mode):
                self._refuse_special(mode)
                _refuse_base(self.place)

    def _remove_seal(self) -> None:
        """Remove the old file's seal, which would report the new file as damaged. In place this is
        durable before the file changes."""
        with self._refusing("cannot remove the old seal of"):
            if self._new is not None:
                remove(self.seal.name, SEAL, self._dir_fd)
            elif remove(os.fspath(self.seal), SEAL):
                sync_directory(self.seal)

    def abort(self) -> None:
        """Drop an unpublished file, and close. Idempotent, also after publish."""
        self.close()

    def close(self) -> None:
        """Close what was opened here. Idempotent."""
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
            raise target_error(error, what, self.name) from error


def _refuse_base(place: Path) -> None:
    # Not needed for a new name, and a restore has no time for the module.
    from pyqmigrate.io.increments_of import refuse_base

    refuse_base(place)


def _is_same(path: Path, info: os.stat_result, *, follow: bool = False) -> bool:
    """Return whether the file with ``info`` is under this path. Raises OSError."""
    try:
        return os.path.samestat(path.stat(follow_symlinks=follow), info)
    except FileNotFoundError:
        return False
