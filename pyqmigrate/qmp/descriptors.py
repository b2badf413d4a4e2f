"""Descriptors from clients: received at their position in the stream, pending, named.

A descriptor arrives with the first byte of its message, which may be before, inside or after the text
of the command that takes it. It is then *pending* on its connection until a command takes it,
another message replaces it, or the connection ends
(docs/internals/qemu-management.md, "Passing descriptors").
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket

from pyqmigrate.migration.fdset import FdsetError

__all__ = ["NamedFds", "PendingFds", "Received", "Receiver"]

_MOST = 253  # descriptors in one message, a limit of the kernel
_ROOM = socket.CMSG_SPACE(_MOST * array.array("i").itemsize)
_NONE_SUPPLIED = "No file descriptor supplied via SCM_RIGHTS"

Received = tuple[bytes, list[int]]
"""Bytes, and the descriptors that came with the first of them; ``b""`` at the end."""


class Receiver:
    """Reads a non-blocking UNIX stream socket and keeps the positions of descriptors.

    The socket belongs to the caller. One large receive could join earlier text with the message that
    carries descriptors, and hide where the message began. So a peek first shows whether descriptors
    are waiting: if not, all bytes seen are received at once; otherwise bytes are received one by one
    up to the first with descriptors.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._held: Received | None = None

    def receive(self, size: int) -> Received:
        """Return up to ``size`` bytes, and descriptors, which the caller owns; close-on-exec.

        Raises BlockingIOError if nothing has arrived, OSError if the connection broke.
        """
        if self._held is not None:
            held, self._held = self._held, None
            return held
        # Without room for descriptors, a peek reports them by MSG_CTRUNC and installs none. It
        # also reports those beyond the bytes that it returns, without their position.
        seen, _, flags, _ = self._sock.recvmsg(size, 0, socket.MSG_PEEK)
        if not flags & socket.MSG_CTRUNC:
            return self._take(len(seen))  # no more: later bytes may carry some
        before = bytearray()
        while len(before) < size:
            try:
                byte, fds = self._take(1)
            except BlockingIOError:  # they came, but this process can open no more
                if before:
                    break
                raise
            if fds and before:
                self._held = byte, fds
                break
            before += byte
            if fds or not byte:
                return bytes(before), fds
        return bytes(before), []

    def close(self) -> None:
        """Close descriptors that were received but not yet returned; not the socket."""
        held, self._held = self._held, None
        for fd in held[1] if held else ():
            os.close(fd)

    def _take(self, size: int) -> Received:
        data, ancillary, _, _ = self._sock.recvmsg(size, _ROOM, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        return data, fds.tolist()


class PendingFds:
    """The descriptors of the last message that had any, until a command takes them."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def put(self, fds: list[int]) -> None:
        """Replace and close the pending descriptors, if ``fds`` is not empty.

        O_NONBLOCK is cleared, as QEMU does.
        """
        if not fds:
            return
        self.close()
        self._fds = fds
        for fd in fds:
            with contextlib.suppress(OSError):  # an O_PATH descriptor has no such flag
                os.set_blocking(fd, True)

    def take(self) -> int:
        """Return the first descriptor, which the caller then owns, and close the others.

        Raises FdsetError if none is pending.
        """
        if not self._fds:
            raise FdsetError(errno.EBADF, _NONE_SUPPLIED)
        fd = self._fds.pop(0)
        self.close()
        return fd

    def close(self) -> None:
        """Close the pending descriptors."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


class NamedFds:
    """Descriptors that clients of one monitor have named, for ``fd:NAME``. Owns them."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def add(self, name: str, fd: int) -> None:
        """Keep ``fd`` under ``name``, and close the former one.

        Raises FdsetError (EINVAL) for a name that begins with a digit, and closes ``fd``.
        """
        if "0" <= name[:1] <= "9":
            os.close(fd)
            raise FdsetError(
                errno.EINVAL, "Parameter 'fdname' expects a name not starting with a digit"
            )
        old = self._fds.get(name)
        self._fds[name] = fd
        if old is not None:
            os.close(old)

    def take(self, name: str) -> int:
        """Return the descriptor of that name, which the caller then owns.

        Raises FdsetError (ENOENT) for an unknown name.
        """
        try:
            return self._fds.pop(name)
        except KeyError:
            raise FdsetError(
                errno.ENOENT, f"File descriptor named '{name}' has not been found"
            ) from None

    def close(self, name: str) -> None:
        """Close the descriptor of that name. Raises FdsetError (ENOENT) for an unknown name."""
        fd = self._fds.pop(name, None)
        if fd is None:
            raise FdsetError(errno.ENOENT, f"File descriptor named '{name}' not found")
        os.close(fd)

    def close_all(self) -> None:
        """Close every descriptor."""
        while self._fds:
            os.close(self._fds.popitem()[1])
