"""The exceptions of this package, as one tree.

Everything that this package raises on purpose is a :class:`PyqmigrateError`. Each class is
also a subclass of the built-in that a caller would expect, so ``except OSError`` and ``except ValueError``
keep working::

    PyqmigrateError
    |-- SnapshotError    (ValueError)    the file is not a complete, well-formed snapshot
    |   `-- SnapshotTruncated            it ends too early
    |-- UsageError       (ValueError)    an argument is wrong; nothing was touched
    |   `-- BlockMismatch                the blocks given are not the blocks of the snapshot
    |-- TargetError      (OSError)       the system refused: errno, file name and position
    |   |-- NoSpace                      the file system is full, or would be
    |   |-- NotDurable                   the file is published and complete, but may not survive a crash
    |   `-- DirectIORefused              direct I/O was demanded and is not available
    |-- GuestMemoryError (OSError)       guest memory went away or cannot be reached
    |-- QemuError        (RuntimeError)  a QEMU did not do as requested
    |   |-- QemuRefused                  it answered a command with an error
    |   |-- QemuGone                     it ended, or hung up
    |   `-- LiveSaveAbandoned            a live save was given up: the pause would be too long
    |-- NotSupported     (NotImplementedError)   well-formed, but not supported
    |-- Cancelled        (RuntimeError)  the job was cancelled
    `-- JobTimeout       (TimeoutError)  the job is still running
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any

__all__ = [
    "BlockMismatch",
    "Cancelled",
    "DirectIORefused",
    "GuestMemoryError",
    "JobTimeout",
    "LiveSaveAbandoned",
    "NoSpace",
    "NotDurable",
    "NotSupported",
    "PyqmigrateError",
    "QemuError",
    "QemuGone",
    "QemuRefused",
    "SnapshotError",
    "SnapshotTruncated",
    "TargetError",
    "UsageError",
]


class PyqmigrateError(Exception):
    """Base of everything that this package raises on purpose.

    Its instances can be pickled and copied with their text, attributes and notes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by calling the class: its parameters differ from ``args``.
        args: tuple[object, ...] = self.args
        if isinstance(self, OSError) and self.filename is not None:
            args = (self.errno, self.strerror, self.filename)
        return _rebuilt, (type(self), args), self.__dict__ or None


def _rebuilt(kind: type[PyqmigrateError], args: tuple[object, ...]) -> PyqmigrateError:
    """Return an error of ``kind`` with these arguments, without its attributes."""
    # The first __new__ of a class with two built-in bases need not be the one that is safe for it.
    new = OSError.__new__ if issubclass(kind, OSError) else kind.__new__
    error: PyqmigrateError = new(kind, *args)
    if isinstance(error, OSError):
        OSError.__init__(error, *args)
    return error


class SnapshotError(PyqmigrateError, ValueError):
    """A file is not a complete, well-formed snapshot.

    ``offset`` is the absolute file offset (bytes) of the problem, ``block`` its RAM block, ``field``
    the field of the format; each may be None. The three are part of the message.
    """

    def __init__(
        self,
        message: str,
        *,
        offset: int | None = None,
        block: str | None = None,
        field: str | None = None,
    ) -> None:
        where = []
        if block is not None:
            where.append(f"block {block!r}")
        if field is not None:
            where.append(f"field {field}")
        if offset is not None:
            where.append(f"file offset {offset:#x}")
        super().__init__(f"{message} ({', '.join(where)})" if where else message)
        self.offset = offset
        self.block = block
        self.field = field


class SnapshotTruncated(SnapshotError):
    """A stream ends too early: it was cut short, or the save did not finish."""


class UsageError(PyqmigrateError, ValueError):
    """An argument is wrong; nothing was changed."""


class BlockMismatch(UsageError):
    """The blocks given to a load are not those of the snapshot: unknown, missing or mis-sized."""


class TargetError(PyqmigrateError, OSError):
    """The system refused an operation on the target; ``errno`` and ``filename`` are kept.

    ``position`` is the file position (bytes) of a failed read or write, or None.
    """

    def __init__(
        self,
        errno: int,
        what: str,
        filename: str | os.PathLike[str] | None = None,
        *,
        position: int | None = None,
    ) -> None:
        at = "" if position is None else f" at file offset {position:#x}"
        name = None if filename is None else os.fspath(filename)
        super().__init__(errno, f"{what}{at}: {os.strerror(errno)}", name)
        self.position = position


class DamagedContent(SnapshotError, TargetError):
    """A part of a stored or compact snapshot is damaged, as a digest or checksum shows.

    It is a SnapshotError, and since it is found by a read an OSError with EIO.
    """

    def __init__(
        self,
        what: str,
        filename: str | os.PathLike[str] | None = None,
        *,
        position: int | None = None,
    ) -> None:
        at = "" if position is None else f" at file offset {position:#x}"
        name = None if filename is None else os.fspath(filename)
        OSError.__init__(self, _errno.EIO, f"{what}{at}", name)
        self.offset = self.position = position
        self.block = self.field = None

    def __str__(self) -> str:
        name = "" if self.filename is None else f": {self.filename!r}"
        return f"{self.strerror}{name}"


class NoSpace(TargetError):
    """The file system is full, or would be before the snapshot is complete."""

    def __init__(
        self,
        what: str,
        filename: str | os.PathLike[str] | None = None,
        *,
        errno: int = _errno.ENOSPC,
        position: int | None = None,
    ) -> None:
        super().__init__(errno, what, filename, position=position)


class NotDurable(TargetError):
    """The file is complete and has its name, but the name could not be made durable: a crash of the
    host may remove it. Later steps (a seal, the end of the guest) were not done."""

    def __init__(self, errno: int, filename: str | os.PathLike[str]) -> None:
        super().__init__(
            errno,
            "the file is there and whole, but a crash of the host may take it away: it "
            "cannot be made durable under its name; sync the file system",
            filename,
        )


def target_error(
    error: OSError,
    what: str,
    filename: str | os.PathLike[str] | None = None,
    *,
    position: int | None = None,
) -> TargetError:
    """Return a TargetError for the system's error, or NoSpace if the disk or a quota is full; ``what``
    failed for ``filename``."""
    number = error.errno or _errno.EIO
    if number in (_errno.ENOSPC, _errno.EDQUOT):
        return NoSpace(what, filename, errno=number, position=position)
    return TargetError(number, what, filename, position=position)


class DirectIORefused(TargetError):
    """Direct I/O was demanded (``direct_io="on"``) and is not available for this file."""


class GuestMemoryError(PyqmigrateError, OSError):
    """Guest memory shrank, vanished or is not accessible; ``errno`` is kept."""

    def __init__(self, errno: int, what: str, *, block: str | None = None) -> None:
        name = "" if block is None else f" of block {block!r}"
        super().__init__(errno, f"{what}{name}: {os.strerror(errno)}")
        self.block = block


class QemuError(PyqmigrateError, RuntimeError):
    """A QEMU did not start, did not answer, or failed at a request."""


class QemuRefused(QemuError):
    """QEMU answered a command with an error.

    ``command`` is the QMP command, ``desc`` and ``error_class`` are QEMU's.
    """

    def __init__(self, command: str, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(f"QEMU refused {command}: {desc}")
        self.command = command
        self.desc = desc
        self.error_class = error_class


class QemuGone(QemuError):
    """QEMU exited, was killed, or closed its monitor connection."""


class LiveSaveAbandoned(QemuError):
    """A live save was abandoned, because it would have paused the guest for too long, or would not
    have ended. The guest runs as before, and nothing is left."""


class NotSupported(PyqmigrateError, NotImplementedError):
    """The input is well-formed, but this package does not support it."""


class Cancelled(PyqmigrateError, RuntimeError):
    """The job was cancelled before it completed, and cleaned up."""


class JobTimeout(PyqmigrateError, TimeoutError):
    """The job did not end within the time given; it is still running."""
