"""Unmount a mount of this package and wait until its keeper has ended."""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass

from pyqmigrate.errors import TargetError, UsageError
from pyqmigrate.mount.asking import connect
from pyqmigrate.mount.mounting import find_mounts, unmount
from pyqmigrate.mount.users import users_of

__all__ = ["Unmounted", "end_mount", "place_of"]

_LIMIT = 10.0  # seconds
_NAMED_MAX = 5  # processes in a message


@dataclass(frozen=True)
class Unmounted:
    """``keeper`` is its process, None if none answered; ``ended`` is false while files are open."""

    directory: str
    keeper: int | None
    ended: bool


def place_of(directory: str) -> str:
    """Return the absolute path of a mount point, as the kernel has it, without looking into it."""
    parent, name = os.path.split(os.path.abspath(directory))
    return os.path.join(os.path.realpath(parent), name)


def end_mount(directory: str, *, lazy: bool = False) -> Unmounted:
    """Unmount ``directory`` and wait for the end of its keeper.

    With ``lazy`` only the name goes away: open files stay readable, and the keeper ends with the
    last. Raises UsageError if nothing of this package is mounted there, TargetError (EBUSY) with the
    processes that use it.
    """
    place = place_of(directory)
    mounts = find_mounts(place)
    if not mounts:
        raise UsageError(
            f"{directory!r} is not a mount of pyqmigrate; see pyqmigrate mount --status"
        )
    client = connect(mounts[-1].device, mounts[-1].uid)
    pid = ended = None
    if client is not None:
        pid = client.pid
        client.close()
        ended = _open_process(pid)
    try:
        _unmount(place, directory, lazy=lazy)
        if ended is None:
            return Unmounted(place, pid, True)
        is_over, _, _ = select.select([ended], [], [], 0.2 if lazy else _LIMIT)
        return Unmounted(place, pid, bool(is_over))
    finally:
        if ended is not None:
            os.close(ended)


def _unmount(place: str, directory: str, *, lazy: bool) -> None:
    try:
        unmount(place, lazy=lazy)
    except TargetError as error:
        users = users_of(place) if error.errno == errno.EBUSY else []
        if not users:
            raise
        named = ", ".join(f"{user.command} ({user.pid})" for user in users[:_NAMED_MAX])
        more = f" and {len(users) - _NAMED_MAX} more" if len(users) > _NAMED_MAX else ""
        text = f"cannot unmount: in use by {named}{more}; --lazy only takes the name away"
        raise TargetError(errno.EBUSY, text, directory) from error


def _open_process(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
