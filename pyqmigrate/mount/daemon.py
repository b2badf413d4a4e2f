"""The process of a keeper, which :func:`pyqmigrate.mount.starting.start_keeper` starts.

The keeper is a process of its own, without the threads and descriptors of the program that starts it. It mounts,
so that no mount is left when the program is killed: until the program says "release", the end of its
socket unmounts.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from pyqmigrate.errors import PyqmigrateError, target_error
from pyqmigrate.mount.asking import error_object, listen
from pyqmigrate.mount.files import import_readers, open_files
from pyqmigrate.mount.keeper import Keeper, KeeperSettings
from pyqmigrate.mount.messages import Messages
from pyqmigrate.mount.mounting import find_mounts, mount, unmount
from pyqmigrate.mount.server import Owner
from pyqmigrate.mount.starting import MountRequest

__all__ = ["main"]

_READ_AHEAD = 1024  # KiB; measured, docs/mount.md
_OOM_NEVER = "-1000"


def main(control_fd: int, modules: list[str]) -> NoReturn:
    """Be the keeper: the order is on standard input, ``control_fd`` leads to the program.

    The order may come later, or not at all; ``modules`` are imported before.
    """
    if os.fork():
        os._exit(0)  # the program need not wait for the keeper, ever
    os.set_inheritable(control_fd, False)
    control = socket.socket(fileno=control_fd)
    status = 1
    try:
        import_readers(modules)
        text = sys.stdin.read()
        if text:  # otherwise it is not needed
            order = json.loads(text)
            names = order.pop("names")
            request = MountRequest(**order, names=None if names is None else tuple(names))
            _detach()
            _serve(request, control)
        status = 0
    except (OSError, PyqmigrateError) as error:
        with contextlib.suppress(OSError):
            control.sendall(json.dumps({"error": error_object(error)}).encode() + b"\n")
    finally:
        os._exit(status)


def _serve(request: MountRequest, control: socket.socket) -> None:
    fd = mount(request.directory, request.shown, allow_other=request.allow_other)
    try:
        device = find_mounts(request.directory)[-1].device
        keeper = Keeper(
            fd,
            lambda: open_files(request.place, request.names, request.cache),
            KeeperSettings(
                request.directory,
                request.shown,
                Owner(os.geteuid(), os.getegid(), readable_by_all=request.allow_other),
                device=device,
                read_ahead_kib=_READ_AHEAD,
                private=request.private,
                record=request.record,
                ahead=request.ahead,
                remember=request.remember,
                follow=request.follow,
            ),
            control=control,
            listener=listen(device),
            messages=Messages(_log_writer(request.log)),
        )
    except BaseException:
        unmount(request.directory, lazy=True)
        raise
    keeper.run()


def _detach() -> None:
    """Keep no directory busy, hold no terminal, and be the last to be killed for memory."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_OOM_NEVER)  # root only; workers take it back


def _log_writer(path: str) -> Callable[[str], object] | None:
    """Return what appends a line to the log, or None without one."""
    if not path:
        return None
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise target_error(error, "cannot write the log", path) from error

    def write(text: str) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(fd, f"{when} {text}\n".encode(errors="surrogateescape"))

    return write
