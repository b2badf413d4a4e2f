"""The target behind the address of a migration, outgoing or incoming."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from pyqmigrate.errors import (
    DirectIORefused,
    NotSupported,
    PyqmigrateError,
    TargetError,
    UsageError,
)
from pyqmigrate.io.target import Descriptors
from pyqmigrate.migration.fdset import FdsetError, FdSets, is_fdset_name
from pyqmigrate.migration.fdset_checks import Direction
from pyqmigrate.qapi.address import Address, Transport
from pyqmigrate.qapi.policy import Policy

__all__ = ["OpenError", "TakeFd", "no_named_fd", "open_error", "opens_late", "target_of"]

TakeFd = Callable[[str], int]
"""Returns the descriptor that a monitor's client named, which the caller then owns.
Raises an error for an unknown name."""


class OpenError(PyqmigrateError, OSError):
    """The target or source of a migration cannot be opened or written; the text is QEMU's."""

    def __str__(self) -> str:
        return str(self.strerror)


def open_error(verb: str, address: Address, error: Exception) -> Exception:
    """Return the system's refusal of a path in QEMU's words, and any other error unchanged."""
    if not isinstance(error, TargetError) or error.errno is None:
        return error
    return OpenError(error.errno, f"Could not {verb} '{address.path}': {os.strerror(error.errno)}")


def no_named_fd(name: str) -> int:
    """Refuse every name of ``getfd``: the default of a program without a monitor."""
    raise UsageError(f"File descriptor named '{name}' has not been found")


def target_of(
    address: Address,
    direction: Direction,
    *,
    direct_io: bool,
    policy: Policy,
    fdsets: FdSets,
    take_fd: TakeFd,
    resources: contextlib.ExitStack,
) -> str | Descriptors:
    """Return the target that the address names: a ``file:`` URI, or descriptors.

    Descriptors are borrowed from a fdset or taken by ``take_fd``, and released by ``resources``.
    Raises FdsetError, UsageError, and NotSupported for a transport other than a file.
    """
    if address.transport is Transport.FD:
        fd = take_fd(address.path)
        resources.callback(os.close, fd)
        if not policy.qemu.files_by_fd:
            raise UsageError("fd: migration to a file is not supported. Use file: instead.")
        return Descriptors(fd, offset=_position(fd))
    if address.transport is not Transport.FILE:
        raise NotSupported(f"migration over {address.transport} is not possible here, only files")
    if not is_fdset_name(address.path):
        return f"file:{address.path},offset={address.offset}"

    def borrow(flags: int) -> int:
        return resources.enter_context(fdsets.open(address.path, flags)).fileno()

    create = os.O_CREAT if direction is Direction.SAVE else 0
    main = borrow(direction.value | create)
    pages = borrow(direction.value | os.O_DIRECT) if direct_io else None
    offset = address.offset
    if offset == 0 and policy.compat:
        offset = _position(main)  # QEMU seeks only to an offset that is not 0
        if offset and direction is Direction.SAVE:
            os.ftruncate(main, 0)  # and truncates to the offset that was asked for
    return Descriptors(main, pages, offset, scattered=policy.compat)


def opens_late(error: Exception) -> bool:
    """Return whether QEMU would raise this error of a save only after its reply to ``migrate``.

    It opens the channels' descriptors in the migration's thread
    (docs/internals/qemu-management.md, "System calls of a save").
    """
    if isinstance(error, FdsetError):
        return bool(error.flags & os.O_DIRECT)
    return isinstance(error, DirectIORefused)


def _position(fd: int) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        raise UsageError(f"descriptor {fd} is not a file: {error.strerror}") from error
