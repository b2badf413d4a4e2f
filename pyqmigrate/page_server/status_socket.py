"""A UNIX socket that shows how far a page server is: a line of JSON for each connection."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pyqmigrate.errors import target_error
from pyqmigrate.io.socket_path import SocketPath, remove_stale_socket
from pyqmigrate.io.threads import start_thread

__all__ = ["StatusSocket"]


class StatusSocket:
    """Listens at ``path``, for this user only; ``status`` is called in a thread. A context manager.

    A socket of a process that has gone is replaced. Raises TargetError if anything else is there.
    """

    def __init__(self, path: Path, status: Callable[[], dict[str, Any]]) -> None:
        self._path = path
        self._status = status
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._name: SocketPath | None = None
        try:
            remove_stale_socket(path)
            self._name = SocketPath(path)
            before = os.umask(0o177)
            try:
                self._socket.bind(self._name.path)
            finally:
                os.umask(before)
            self._socket.listen()
        except OSError as error:
            self._let_go()
            raise target_error(error, "cannot make the socket", path) from error
        except BaseException:
            self._let_go()
            raise
        self._thread = threading.Thread(target=self._serve, name="pyqmigrate-status", daemon=True)
        start_thread(self._thread)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(1.0)
                connection.sendall(json.dumps(self._status()).encode("ascii") + b"\n")

    def _let_go(self) -> None:
        self._socket.close()
        if self._name is not None:
            self._name.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._let_go()
