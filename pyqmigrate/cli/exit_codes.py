"""The exit codes of the command, and the code of each error."""

from __future__ import annotations

import enum

from pyqmigrate.errors import (
    Cancelled,
    GuestMemoryError,
    NotSupported,
    PyqmigrateError,
    QemuError,
    SnapshotError,
    UsageError,
)

__all__ = ["ExitCode", "exit_code"]


class ExitCode(enum.IntEnum):
    """The exit status of the command."""

    DONE = 0
    BAD = 1
    USAGE = 2
    REFUSED = 3
    GUEST = 4
    NOT_SUPPORTED = 5
    INTERRUPTED = 130


_CODES: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (SnapshotError, ExitCode.BAD),
    (UsageError, ExitCode.USAGE),
    (GuestMemoryError, ExitCode.GUEST),
    (QemuError, ExitCode.GUEST),
    (NotSupported, ExitCode.NOT_SUPPORTED),
    (Cancelled, ExitCode.INTERRUPTED),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
    (PyqmigrateError, ExitCode.REFUSED),
    (OSError, ExitCode.REFUSED),
    (MemoryError, ExitCode.REFUSED),
)


def exit_code(error: BaseException) -> ExitCode | None:
    """Return the code of an error; None for an error that is a bug in this program."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), None)
