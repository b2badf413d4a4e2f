"""Descriptors that clients send: received at their place in the stream, pending, named.

A descriptor comes with the first byte of the message that carried it, which may stand before,
inside or after the text of the command that wants it. It is then *pending* on its connection
until a command takes it, another message replaces it, or the connection ends.
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
    """Reads a non-blocking UNIX stream socket, which stays the caller's, without losing the
    place of a descriptor.

    One large receive would glue text sent earlier before the message that carried descriptors,
    and hide where that began. So the socket is asked first whether any are waiting: if not,
    everything seen is taken at once; if so, bytes are taken one by one up to the first that
    brings some.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._held: Received | None = None

    def receive(self, size: int) -> Received:
        """Return up to ``size`` bytes. The descriptors are the caller's, and close-on-exec.

        Raises BlockingIOError when nothing is there, and OSError when the connection broke.
        """
        if self._held is not None:
            held, self._held = self._held, None
            return held
        # Without room for descriptors, a peek reports them by MSG_CTRUNC and installs none. It
        # may do so for some that stand further on than what it shows: it says that, not where.
        seen, _, flags, _ = self._sock.recvmsg(size, 0, socket.MSG_PEEK)
        if not flags & socket.MSG_CTRUNC:
            return self._take(len(seen))  # no more: what comes meanwhile may bring some
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
    """What the last message with descriptors brought, until somebody takes it."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def put(self, fds: list[int]) -> None:
        """Replace what is pending, if ``fds`` is not empty, and close what was there.

        Descriptors become blocking ones, as QEMU makes them.
        """
        if not fds:
            return
        self.close()
        self._fds = fds
        for fd in fds:
            with contextlib.suppress(OSError):  # an O_PATH descriptor has no such flag
                os.set_blocking(fd, True)

    def take(self) -> int:
        """Return the first descriptor, which is the caller's from now on, and close the others.

        Raises FdsetError when none is pending.
        """
        if not self._fds:
            raise FdsetError(errno.EBADF, _NONE_SUPPLIED)
        fd = self._fds.pop(0)
        self.close()
        return fd

    def close(self) -> None:
        """Close whatever is pending."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


class NamedFds:
    """Descriptors that clients of one monitor have named, for ``fd:NAME``. Owns them."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def add(self, name: str, fd: int) -> None:
        """Keep ``fd`` under ``name``; what was there is closed.

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
        """Return the descriptor of that name, which is the caller's from now on.

        Raises FdsetError (ENOENT) when there is none.
        """
        try:
            return self._fds.pop(name)
        except KeyError:
            raise FdsetError(
                errno.ENOENT, f"File descriptor named '{name}' has not been found"
            ) from None

    def close(self, name: str) -> None:
        """Close the descriptor of that name. Raises FdsetError (ENOENT) when there is none."""
        fd = self._fds.pop(name, None)
        if fd is None:
            raise FdsetError(errno.ENOENT, f"File descriptor named '{name}' not found")
        os.close(fd)

    def close_all(self) -> None:
        """Close every descriptor."""
        while self._fds:
            os.close(self._fds.popitem()[1])
