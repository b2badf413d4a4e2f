"""A UNIX socket that listens at a path, for its own user.

with ListeningSocket(Path("/run/pool.sock"), "the pool's socket") as listening:
    client, _ = listening.socket.accept()
    pid, user = peer_of(client)
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from pathlib import Path
from typing import Self

from pyqmigrate.errors import TargetError
from pyqmigrate.io.socket_path import SocketPath, remove_stale_socket

__all__ = ["ListeningSocket", "peer_of"]

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class ListeningSocket:
    """A socket at ``place``, mode 0600: the attribute ``socket``, which does not block.

    A socket on which no process listens is replaced. Close it: the name is removed, unless another
    process has replaced it. Errors call it ``what``. Raises TargetError if the path is in use or
    cannot be created, UsageError for a file name that a socket cannot have.
    """

    def __init__(self, place: Path, what: str) -> None:
        self.place = place
        self._made: os.stat_result | None = None
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            remove_stale_socket(place)
            with SocketPath(place) as name:
                self.socket.bind(name.path)
            place.chmod(0o600)  # clients cannot connect before listen()
            self._made = place.lstat()
            self.socket.listen()
        except OSError as refused:
            self.socket.close()
            raise TargetError(
                refused.errno or errno.EINVAL, f"cannot listen on {what}", place
            ) from None
        except BaseException:
            self.socket.close()
            raise
        self.socket.setblocking(False)

    def close(self) -> None:
        """Stop listening and remove the name. Idempotent."""
        if self._made is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(self.place.lstat(), self._made):
                    self.place.unlink()
            self._made = None
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return process and user at the other end of an accepted connection, as the kernel knows them."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(credentials)
    return pid, user
