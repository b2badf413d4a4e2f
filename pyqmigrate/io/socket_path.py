"""A name for a UNIX socket that is short enough, whatever its path.

The kernel accepts 107 bytes. For a longer path the directory is opened, and the socket is named
through ``/proc/self/fd``. This name is valid in a process that inherits the descriptor, too: QEMU
creates the socket with it, and removes it by the same name when it ends.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pyqmigrate.errors import UsageError

__all__ = ["SocketPath", "remove_stale_socket"]

_MOST = 107  # bytes in sun_path, without its final NUL


class SocketPath:
    """A name for the socket at ``path``: the attribute ``path``. A context manager.

    ``fds`` are the descriptors that the name needs as long as it is used.
    """

    def __init__(self, path: Path) -> None:
        """Raise UsageError for a missing directory, and a file name that is too long."""
        self.path = str(path)
        self.fds: Sequence[int] = ()
        if len(os.fsencode(path)) <= _MOST:
            return
        try:
            directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"cannot make the socket {path}: {error.strerror}") from error
        self.fds = (directory,)
        self.path = f"/proc/self/fd/{directory}/{path.name}"
        if len(os.fsencode(self.path)) > _MOST:
            self.close()
            raise UsageError(
                f"the file name of the socket {path} has {len(os.fsencode(path.name))} bytes; "
                "about 80 are possible"
            )

    def close(self) -> None:
        """Close it. Idempotent."""
        for fd in self.fds:
            os.close(fd)
        self.fds = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_stale_socket(path: Path) -> None:
    """Remove a socket on which no process listens, and nothing else. Raises OSError."""
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, SocketPath(path) as name:
        probe.setblocking(False)  # the queue of a listener may be full
        try:
            probe.connect(name.path)
        except ConnectionRefusedError:
            path.unlink()
        except OSError:
            pass  # it is in use, or not a stream socket
