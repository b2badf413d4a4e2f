"""Start the keeper of a mount in the background, a process of its own (:mod:`pyqmigrate.mount.daemon`)."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass

from pyqmigrate.errors import TargetError, target_error
from pyqmigrate.mount.asking import KeeperClient

__all__ = ["MountRequest", "start_keeper"]

# The modules of the keeper are imported there only: a restore waits for both processes.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pyqmigrate.mount.daemon import main; main(int(sys.argv[2]))"
)
_LIMIT = 60.0  # seconds until the mount serves: a remote store is opened


@dataclass(frozen=True)
class MountRequest:
    """What to mount where.

    ``place``, ``names`` and ``cache`` are those of :func:`~pyqmigrate.mount.files.open_files`;
    ``ahead`` is the snapshot whose working set is pushed from the start, or empty. ``shown`` names the
    place in messages and in /proc/mounts. ``allow_other`` lets other users read,
    too. ``log`` is the absolute path of a file for messages, or empty. The rest is as in
    KeeperSettings.
    """

    directory: str
    place: str
    shown: str
    names: tuple[str, ...] | None = None
    allow_other: bool = False
    log: str = ""
    private: bool = False
    record: bool = False
    ahead: str = ""
    remember: bool = False
    follow: bool = False
    cache: str = ""


def start_keeper(request: MountRequest) -> KeeperClient:
    """Mount, and return a connection to the keeper when the mount serves.

    The mount is gone when the connection is closed, unless "release" was asked before; files that are
    open stay readable. Raises TargetError, UsageError, NotSupported.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    client = KeeperClient(ours)
    try:
        with theirs:
            _spawn(request, theirs)
        answer = client.wait(_LIMIT)
        if "ready" not in answer:
            raise TargetError(errno.EPROTO, "the keeper does not say that it is ready")
        client.keeper = answer["ready"]
    except BaseException:
        client.close()
        raise
    return client


def _spawn(request: MountRequest, control: socket.socket) -> None:
    paths = json.dumps([path for path in sys.path if os.path.isabs(path)])
    fd = control.fileno()
    command = [sys.executable, "-I", "-c", _START, paths, str(fd), request.directory]
    try:
        subprocess.run(
            command,
            input=json.dumps(asdict(request)).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(fd,),
            start_new_session=True,
            check=True,
            timeout=_LIMIT,
        )
    except subprocess.SubprocessError as error:
        raise TargetError(
            errno.ECHILD, f"the keeper of the mount does not start: {error}"
        ) from error
    except OSError as error:
        raise target_error(error, "cannot start the keeper of the mount", sys.executable) from error
