"""A local cache of compressed packs, for stores that are far away.

Each pack is a sparse file, of which the parts that were read are there. What is in the cache is only a
hint, so nothing needs to be synced or locked, whatever process is killed: a hole is known by its zeros,
and frames and footers have digests. Many processes share one cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from pyqmigrate.errors import TargetError, UsageError, target_error
from pyqmigrate.format.store.pack import MAGIC, PACK_MAX
from pyqmigrate.io.enclosing_store import refuse_in_store
from pyqmigrate.store.place import Bytes

__all__ = ["DEFAULT_LIMIT", "PackCache", "default_directory"]

DEFAULT_LIMIT = 4 << 30  # bytes
_ZSTD = b"\x28\xb5\x2f\xfd"  # what every frame begins with
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CHECKED = 16  # the size is looked at again after a 16th of the limit was written
_FULL = (errno.ENOSPC, errno.EDQUOT)


def default_directory() -> Path:
    """Return where packs are cached if no directory is given: below $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pyqmigrate" / "packs"


class PackCache:
    """A cache in ``directory``, which is created, of ``limit`` bytes on the disk, about.

    All methods may be called by several threads and processes at once. A disk that fails or is full
    makes the cache useless, but raises no error after the directory was opened.
    """

    def __init__(self, directory: str | os.PathLike[str], limit: int = DEFAULT_LIMIT) -> None:
        """Raises TargetError if the directory cannot be used, UsageError for one in a store and for a
        limit below 8 MiB."""
        if limit < PACK_MAX:
            raise UsageError(f"the limit of a cache is at least {PACK_MAX} bytes, not {limit}")
        refuse_in_store(directory, "a cache")
        self.limit = limit
        self._written = 0
        self._lock = threading.Lock()
        try:
            os.makedirs(directory, 0o700, exist_ok=True)
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise target_error(error, "cannot open the cache", directory) from error
        info = os.fstat(self._fd)
        if info.st_uid != os.geteuid() or info.st_mode & 0o022:
            os.close(self._fd)
            raise TargetError(
                errno.EACCES, "other users can write to the directory of the cache", directory
            )
        self.trim()

    def read(self, pack: bytes, offset: int, length: int) -> bytes | None:
        """Return bytes that begin with a frame; None if they are not there."""
        with self._opened(pack) as fd:
            if fd >= 0:
                data = os.pread(fd, length, offset)
                if len(data) == length and data[:4] == _ZSTD:
                    return data
        return None

    def read_end(self, pack: bytes, length: int) -> tuple[bytes, int] | None:
        """Return the last bytes of a pack, and its size; None if they are not there."""
        with self._opened(pack) as fd:
            if fd >= 0:
                size = os.fstat(fd).st_size
                data = os.pread(fd, length, max(0, size - length))
                if data.endswith(MAGIC):
                    return data, size
        return None

    def write(self, pack: bytes, offset: int, data: Bytes, size: int | None = None) -> None:
        """Keep bytes of a pack at ``offset``; ``size`` is that of the pack, if it is known."""
        with self._opened(pack, create=True) as fd:
            if fd >= 0:
                rest = memoryview(data).cast("B")
                while rest:
                    written = os.pwrite(fd, rest, offset)
                    rest, offset = rest[written:], offset + written
                if size is not None and os.fstat(fd).st_size < size:
                    os.ftruncate(fd, size)
        with self._lock:
            self._written += len(data)
            trim = self._written * _CHECKED > self.limit
            if trim:
                self._written = 0
        if trim:
            self.trim()

    def trim(self) -> None:
        """Remove the packs that were used longest ago, until the rest is within the limit."""
        found = []
        with contextlib.suppress(OSError), os.scandir(self._fd) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    info = os.stat(entry.name, dir_fd=self._fd, follow_symlinks=False)
                    if stat.S_ISREG(info.st_mode) and entry.name.endswith(".pack"):
                        found.append((info.st_mtime_ns, info.st_blocks * 512, entry.name))
        found.sort()
        total = sum(size for _, size, _ in found)
        for _, size, name in found:
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._fd)
            total -= size

    def close(self) -> None:
        """Close it; the files remain. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextlib.contextmanager
    def _opened(self, pack: bytes, *, create: bool = False) -> Iterator[int]:
        """Open the file of a pack: -1 if there is none. A failure of the disk ends the block."""
        fd = -1
        name = f"{pack.hex()}.pack"
        try:
            with contextlib.suppress(OSError):
                flags = _OPEN | (os.O_CREAT if create else 0)
                fd = os.open(name, flags, 0o600, dir_fd=self._fd)
                if not create:
                    os.utime(fd)  # used now: removed late
            yield fd
        except OSError as error:
            if error.errno in _FULL:
                self.trim()
        finally:
            if fd >= 0:
                os.close(fd)
