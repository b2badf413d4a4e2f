"""The file behind the address of a migration, outgoing or incoming."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from pyqmigrate.errors import DirectIORefused, NotSupported, UsageError
from pyqmigrate.io.target import Descriptors
from pyqmigrate.migration.fdset import FdsetError, FdSets, is_fdset_name
from pyqmigrate.migration.fdset_checks import Direction
from pyqmigrate.qapi.address import Address, Transport
from pyqmigrate.qapi.policy import Policy

__all__ = ["TakeFd", "opens_late", "target_of"]

TakeFd = Callable[[str], int]


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
    """What the address names: a ``file:`` URI, or descriptors.

    Those are borrowed from a fdset, or taken by ``take_fd``, and go back with ``resources``.
    Raises FdsetError, NotSupported for a transport that is no file, UsageError.
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
            os.ftruncate(main, 0)  # and cuts at the one asked for
    return Descriptors(main, pages, offset, scattered=policy.compat)


def opens_late(error: Exception) -> bool:
    """Whether a save in QEMU would meet this error after ``migrate`` has answered: it opens the
    descriptors for pages in the migration's thread."""
    if isinstance(error, FdsetError):
        return bool(error.flags & os.O_DIRECT)
    return isinstance(error, DirectIORefused)


def _position(fd: int) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        raise UsageError(f"descriptor {fd} is not a file: {error.strerror}") from error
