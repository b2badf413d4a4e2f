"""Ask the keeper of a lazy restore how far it is, from any process of the same user.

state = await wait_for_memory(pid)                        # of QEMU: it has all of its memory
await wait_for_memory(pid, resume="/backup/guest.mapped") # the pages come from this copy from now on
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from pyqmigrate.errors import QemuError, QemuGone, UsageError
from pyqmigrate.io.view import names_stored
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.vm.incoming.keeper.state import status_name
from pyqmigrate.vm.incoming.lazy_process import follow
from pyqmigrate.vm.incoming.lazy_state import LazyState

__all__ = ["wait_for_memory"]

_CREDENTIALS = "iII"
_ATTEMPTS = 2  # to get a state from a keeper


async def wait_for_memory(
    pid: int,
    *,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[LazyState], object] | None = None,
) -> LazyState:
    """Wait until a guest that was restored in mode ``lazy`` has all of its memory; return the last state.

    pid: QEMU's process.
    resume: a good copy of the snapshot, from which the pages come from now on: where a page was
        damaged, the guest goes on.
    progress: called with each state.

    If no lazy restore of the process is under way, its memory is complete, and a state says so. Raises
    QemuGone if the process does not exist or ends, QemuError if the restore fails or its keeper was killed;
    UsageError if there is
    nothing to ``resume``, and the errors of opening the copy.
    """
    copy = None if resume is None else await asyncio.to_thread(_checked_copy, resume)
    # A keeper that is at its end hangs up before it says anything; then there is none.
    for _ in range(_ATTEMPTS):
        connection = _connect(pid)
        if connection is None:
            return _without_keeper(pid, copy)
        with connection:
            last = await _follow(connection, copy, progress)
        if last is not None:
            break
    else:
        raise QemuError("the keeper of the lazy restore hung up")
    if last.state == "gone":
        raise QemuGone(f"process {pid} ended before it had all of its memory")
    if last.state != "completed":
        raise QemuError(last.failure or "the keeper of the lazy restore has ended")
    return last


async def _follow(
    connection: socket.socket, copy: str | None, progress: Callable[[LazyState], object] | None
) -> LazyState | None:
    """Return the last state that a keeper reports; None if it hangs up without one."""
    last: LazyState | None = None

    def take(state: LazyState) -> None:
        nonlocal last
        last = state
        if progress is not None:
            progress(state)

    connection.setblocking(False)
    with contextlib.suppress(OSError):
        if copy is not None:
            line = json.dumps({"resume": copy}).encode() + b"\n"
            await asyncio.get_running_loop().sock_sendall(connection, line)
        await follow(connection, take)
    return last


def _without_keeper(pid: int, copy: str | None) -> LazyState:
    """Return the state of a process that has no keeper: it has all of its memory, or never lacked any.

    Raises QemuGone, UsageError, and QemuError if the keeper was killed before the end.
    """
    if not Path(f"/proc/{pid}").exists():
        raise QemuGone(f"there is no process {pid}")
    if _waits_for_pages(pid):
        raise QemuError(
            f"process {pid} does not have all of its memory, and the keeper of the lazy restore has ended. "
            'Its page server may go on: "query-migrate" of QEMU says so; at "postcopy-paused" use '
            "migrate-recover and pyqmigrate page-server --resume"
        )
    if copy is not None:
        raise UsageError(f"no lazy restore of process {pid} is under way: nothing to resume")
    return LazyState("completed", loaded=True, pages_left=0)


def _waits_for_pages(pid: int) -> bool:
    """Return whether pages of a process are missing: QEMU has a userfaultfd until it has all."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path) == "anon_inode:[userfaultfd]":
                    return True
    return False


def _checked_copy(snapshot: str | os.PathLike[str]) -> str:
    """Return the absolute name of a copy that can be opened. Raises the errors of opening it."""
    name = os.fspath(snapshot)
    with open_snapshot(name):
        pass
    if "://" in name:
        return name
    if names_stored(name):
        place, _, stored = name.rpartition("#")
        return f"{os.path.abspath(place)}#{stored}"
    return os.path.abspath(name)


def _connect(pid: int) -> socket.socket | None:
    """Connect to the keeper of QEMU ``pid``; None if there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(status_name(pid))
    except OSError:
        connection.close()
        return None
    size = struct.calcsize(_CREDENTIALS)
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = struct.unpack(_CREDENTIALS, data)
    if user not in (0, os.geteuid(), _owner(pid)):
        connection.close()
        raise QemuError(f"user {user} answers for the lazy restore of process {pid}")
    return connection


def _owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
