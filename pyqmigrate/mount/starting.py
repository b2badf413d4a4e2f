"""Start the keeper of a mount in the background, a process of its own (:mod:`pyqmigrate.mount.daemon`)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass

from pyqmigrate.errors import TargetError, target_error
from pyqmigrate.mount.asking import KeeperClient
from pyqmigrate.mount.files import reader_modules

__all__ = ["MountRequest", "WaitingKeeper", "start_keeper"]

# The modules of the keeper are imported there only: a restore waits for both processes.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pyqmigrate.mount.daemon import main; main(int(sys.argv[2]), json.loads(sys.argv[3]))"
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


class WaitingKeeper:
    """The process of a keeper that waits for its order, while it imports what it needs for ``place``.

    Use it once: :meth:`start`, or :meth:`close` if it is not needed.
    """

    def __init__(self, directory: str, place: str) -> None:
        """Raises TargetError if the process cannot be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._client = KeeperClient(ours)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with theirs:
                self._process = _spawn(directory, place, theirs.fileno())
        except BaseException:
            self._client.close()
            raise

    def start(self, request: MountRequest) -> KeeperClient:
        """Have it mount; return a connection to it when the mount serves. Raises as
        :func:`start_keeper`."""
        process, self._process = self._process, None
        assert process is not None
        client = self._client
        try:
            _order(process, json.dumps(asdict(request)).encode())
            answer = client.wait(_LIMIT)
            if "ready" not in answer:
                raise TargetError(errno.EPROTO, "the keeper does not say that it is ready")
            client.keeper = answer["ready"]
        except BaseException:
            client.close()
            raise
        return client

    def close(self) -> None:
        """End it, if it was not started. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            self._client.close()
            with contextlib.suppress(TargetError):
                _order(process, b"")


def start_keeper(request: MountRequest) -> KeeperClient:
    """Mount, and return a connection to the keeper when the mount serves.

    The mount is gone when the connection is closed, unless "release" was asked before; files that are
    open stay readable. Raises TargetError, UsageError, NotSupported.
    """
    return WaitingKeeper(request.directory, request.place).start(request)


def _spawn(directory: str, place: str, control: int) -> subprocess.Popen[bytes]:
    paths = json.dumps([path for path in sys.path if os.path.isabs(path)])
    kind = json.dumps(reader_modules(place))
    command = [sys.executable, "-I", "-c", _START, paths, str(control), kind, directory]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(control,),
            start_new_session=True,
        )
    except OSError as error:
        raise target_error(error, "cannot start the keeper of the mount", sys.executable) from error


def _order(process: subprocess.Popen[bytes], order: bytes) -> None:
    """Give a process its order, and wait for the end of the one that was started, which leaves the
    keeper behind. Raises TargetError if it fails."""
    try:
        process.communicate(order, timeout=_LIMIT)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, "keeper")
    except subprocess.SubprocessError as error:
        process.kill()
        process.wait()
        raise TargetError(
            errno.ECHILD, f"the keeper of the mount does not start: {error}"
        ) from error
