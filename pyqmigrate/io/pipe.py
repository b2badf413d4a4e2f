"""A forward-only source: a pipe, or the output of a decompressor.

It is read as a file is, front to back. Bytes that :meth:`ForwardInput.read_at` returns are kept, in a
file without a name, at the offset that they have in the stream; pages, which
:meth:`ForwardInput.read_once` returns, are not. So the framing and the device state can be read
again, and pages cannot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pyqmigrate.errors import Cancelled, NotSupported, UsageError, target_error
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX
from pyqmigrate.io.direct_io import Direct, DirectIO
from pyqmigrate.io.input import Source

if TYPE_CHECKING:
    from pyqmigrate.io.view import SharedView

__all__ = ["KEPT_MAX", "ForwardInput", "PipeReader"]

KEPT_MAX = 256 << 20  # bytes of framing and device state
_PIECE = 1 << 20
_MOMENT = 100  # milliseconds between two looks at whether the work was cancelled

Read = Callable[[int, Callable[[], bool]], bytes]


class ForwardInput:
    """A forward-only :class:`~pyqmigrate.io.input.Source`.

    ``start`` starts to read from the front: it returns a function that reads up to a number of
    bytes, none at the end, and polls whether to give up. ``again`` says that ``start`` can be called
    more than once. ``close`` releases what it reads from. ``beneath`` is the file that is
    decompressed.
    """

    forward = True
    is_device = False
    offset = 0

    def __init__(
        self,
        name: str,
        start: Callable[[], Read],
        close: Callable[[], None],
        *,
        again: bool = False,
        beneath: Source | None = None,
    ) -> None:
        self.name = name
        self.place: Path | None = None if beneath is None else beneath.place
        self.view: SharedView | None = None if beneath is None else beneath.view
        self._stop: Callable[[], bool] = lambda: False
        self._start, self._close, self._again, self._beneath = start, close, again, beneath
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self.fd = self._file.fileno()
        self._begin()

    def _begin(self) -> None:
        self._read = self._start()
        self._file.truncate(0)
        self._position = 0  # bytes read so far
        self._kept = 0
        self._chunk, self._chunk_at = b"", 0  # the last bytes of read_once, and their offset
        self._passed = self._ended = False

    @property
    def size(self) -> int:
        """Length of the stream, bytes; before it has ended, more than any stream has."""
        return self._position if self._ended else OFFSET_MAX

    @property
    def repeatable(self) -> bool:
        return self._again

    def rewind(self) -> None:
        if not self._passed:
            return
        if not self._again:
            raise UsageError(f"{self.name!r} was read already; put it into a file to read it again")
        self._begin()

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes as pread does; everything up to that point is kept."""
        self._keep(self._chunk_at)
        while self._position < offset + length and self._fetch():
            self._keep(self._chunk_at)
        parts = []
        length = max(0, min(length, self._position - offset))
        while length > 0:
            part = os.pread(self.fd, length, offset)
            if not part:  # pages that were not kept, at the end
                part = bytes(length)
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def read_once(self, offset: int, length: int = _PIECE) -> bytes:
        """Return available bytes at ``offset``, up to ``length``; none at the end of the stream."""
        self._passed = True
        begin = offset - self._chunk_at
        if 0 <= begin < len(self._chunk):
            return self._chunk[begin : begin + length]
        if offset < self._position:
            return os.pread(self.fd, min(length, self._position - offset), offset)
        self._fetch()
        return self._chunk[:length]

    def keep_from(self, offset: int) -> None:
        """Keep the available bytes from ``offset`` on; those before it have been used."""
        if offset > self._chunk_at and self._chunk:
            self._keep(offset)

    def poll_with(self, stop: Callable[[], bool]) -> None:
        """Give up with Cancelled when ``stop`` returns True."""
        self._stop = stop

    def run_out(self) -> int:
        """Keep all that follows, and return the length of the stream."""
        self._keep(self._chunk_at)
        while self._fetch():
            self._keep(self._chunk_at)
        os.ftruncate(self.fd, self._position)
        return self._position

    def _fetch(self) -> bool:
        """Read the next chunk, if there is one."""
        if self._stop():
            raise Cancelled("cancelled")
        self._chunk, self._chunk_at = self._read(_PIECE, self._stop), self._position
        self._position += len(self._chunk)
        self._ended = not self._chunk
        return not self._ended

    def _keep(self, offset: int) -> None:
        data, self._chunk = self._chunk[offset - self._chunk_at :], b""
        self._kept += len(data)
        if self._kept > KEPT_MAX:
            raise NotSupported(
                f"more than {KEPT_MAX >> 20} MiB beside pages in a stream that is read only once: "
                "put it into a file first"
            )
        while data:
            try:
                done = os.pwrite(self.fd, data, offset)
            except OSError as error:
                raise target_error(
                    error, "cannot keep device state", tempfile.gettempdir()
                ) from error
            data, offset = data[done:], offset + done

    def open_direct(self, setting: DirectIO) -> tuple[Direct | None, str]:
        return None, "the stream is read front to back"

    def close_direct(self, direct: Direct | None) -> None:
        """Do nothing: there is no direct descriptor."""

    def allocated_bytes(self) -> int:
        return 0 if self._beneath is None else self._beneath.allocated_bytes()

    @property
    def file_fd(self) -> int:
        return self.fd if self._beneath is None else self._beneath.fd

    @property
    def file_size(self) -> int:
        return self.size if self._beneath is None else self._beneath.size

    def close(self) -> None:
        if self.fd >= 0:
            self._file.close()
            self.fd = -1
            self._close()


class PipeReader:
    """A pipe or socket, opened by its path. Calling it reads, see :data:`Read`."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or not Path(path).samefile("/dev/stdin"):
                raise target_error(error, "cannot open", path) from error
            self._fd = os.dup(0)  # a socket cannot be opened

    @staticmethod
    def is_pipe(path: str) -> bool:
        try:
            mode = Path(path).stat().st_mode
        except (OSError, ValueError):
            return False
        return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)

    def __call__(self, length: int, stop: Callable[[], bool]) -> bytes:
        """Return up to ``length`` bytes, none at the end; wait until there are some."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        parts, have = [], 0
        with self._refusing():
            while have < length:
                # A read of a pipe returns 64 KiB at most: go on while more is available.
                while not poll.poll(0 if have else _MOMENT) and not have:
                    if stop():
                        raise Cancelled("cancelled")
                try:
                    part = os.read(self._fd, length - have)
                except BlockingIOError:
                    break
                if not part:
                    break
                parts.append(part)
                have += len(part)
        return b"".join(parts)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise target_error(error, "cannot read", self.path) from error

    def close(self) -> None:
        os.close(self._fd)
