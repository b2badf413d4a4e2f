"""The other end of a monitor's connection, as the kernel knows it.

QEMU's own answers are untrusted: a QEMU taken over by its guest, or another program that bound the
socket's name, may name the threads and addresses of any process. The kernel can be trusted: it
records who called ``listen()`` (``SO_PEERCRED``) and which socket is at the other end of a
connection (``sock_diag``). A process belongs to the connection when

- it holds that socket (``/proc/PID/fd``), so neither a manager that passed a listening socket on
  nor an unrelated process qualifies, and
- it has no more rights than the listener: the same real, effective and saved user and group, and
  nothing gained by a set-user-ID program or file capabilities. A listener that is root may have
  passed the socket to any process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["Peer", "read_status"]

_PROC = Path("/proc")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

# linux/sock_diag.h, linux/unix_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_UDIAG_SHOW_PEER = 4
_UNIX_DIAG_PEER = 2
_ANY_STATE = _NO_COOKIE = 0xFFFFFFFF
_NETLINK_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_REQUEST = struct.Struct("=BBHIIIII")  # family, protocol, pad, states, inode, show, cookie
_ANSWER = struct.Struct("=BBBBIII")  # family, type, state, pad, inode, cookie
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_INODE = struct.Struct("=I")
_NLM_F_REQUEST = 1
_CONNECTED = "03"  # in /proc/net/unix


@dataclass(frozen=True)
class Peer:
    """The listener, and the sockets that may be the other end of a connection.

    ``pid`` is None if the listener is not in this process's pid namespace. ``sockets`` are inode
    numbers: one where the kernel has ``sock_diag`` for UNIX sockets, otherwise those of all
    connections to the same listener.
    """

    pid: int | None
    uid: int
    gid: int
    sockets: frozenset[int]

    @classmethod
    def of(cls, connection: socket.socket) -> Self:
        """Return the peer of a UNIX socket whose connection has been accepted."""
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        pid, uid, gid = _CREDENTIALS.unpack(credentials)
        try:
            sockets = frozenset({_other_end(connection)})
        except OSError:
            sockets = _connections(connection)
        return cls(pid or None, uid, gid, sockets)

    def why_not(self, pid: int) -> str | None:
        """Return why process ``pid`` is not accepted as the other end, or None if it is."""
        process = _PROC / str(pid)
        try:
            # Owned by root if the process may know secrets that its user may not.
            owner = (process / "fd").stat()
            ids = read_status(process)
            users, groups = ({int(number) for number in ids[key]} for key in ("Uid", "Gid"))
        except (OSError, LookupError):
            return f"process {pid} has ended"
        users.add(owner.st_uid)
        groups.add(owner.st_gid)
        if self.uid != 0 and (users != {self.uid} or groups != {self.gid}):
            return (
                f"process {pid} does not have the rights of user {self.uid}, who listens on the "
                "monitor's socket"
            )
        try:
            held = {_inode_of(link) for link in (process / "fd").iterdir()} - {None}
        except OSError as error:
            return (
                f"/proc/{pid}/fd cannot be read ({error.strerror}), so it is unknown whether "
                f"process {pid} is at the other end of the monitor's socket: run as the user of QEMU, "
                "or as root (CAP_SYS_PTRACE)"
            )
        if held & self.sockets:
            return None
        return f"process {pid} is not at the other end of the monitor's socket"


def read_status(process: Path) -> dict[str, list[str]]:
    """Return the words of each line of ``/proc/PID/status``; empty if the process has ended."""
    try:
        lines = (process / "status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}


def _inode_of(link: Path) -> int | None:
    """Return the inode of the socket that a link in /proc/PID/fd names; None for other files."""
    name = ""
    with contextlib.suppress(OSError):
        name = os.fspath(link.readlink())
    return int(name[len("socket:[") : -1]) if name.startswith("socket:[") else None


def _other_end(connection: socket.socket) -> int:
    """Return the inode of the socket at the other end; OSError without ``sock_diag``."""
    own = os.fstat(connection.fileno()).st_ino
    request = _REQUEST.pack(
        socket.AF_UNIX, 0, 0, _ANY_STATE, own, _UDIAG_SHOW_PEER, _NO_COOKIE, _NO_COOKIE
    )
    header = _NETLINK_HEADER.pack(
        _NETLINK_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.send(header + request)
        answer = netlink.recv(8192)
    length, kind, *_ = _NETLINK_HEADER.unpack_from(answer)
    if kind != _SOCK_DIAG_BY_FAMILY:  # an error number
        raise OSError("no sock_diag for UNIX sockets")
    offset = _NETLINK_HEADER.size + _ANSWER.size
    while offset + _ATTRIBUTE.size <= length:
        size, attribute = _ATTRIBUTE.unpack_from(answer, offset)
        if attribute == _UNIX_DIAG_PEER:
            inode = int(_INODE.unpack_from(answer, offset + _ATTRIBUTE.size)[0])
            if inode:  # 0: not accepted yet
                return inode
        offset += max(size + 3 & ~3, _ATTRIBUTE.size)
    raise OSError("the socket has no other end")


def _connections(connection: socket.socket) -> frozenset[int]:
    """Return all accepted connections to the listener's name; its owner may not hold them."""
    name = connection.getpeername()
    wanted = os.fsdecode(name).replace("\0", "@") if isinstance(name, bytes) else name
    try:
        lines = (_PROC / "net/unix").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    rows = (line.split(maxsplit=7) for line in lines[1:])
    return frozenset(
        int(row[6]) for row in rows if len(row) == 8 and row[5] == _CONNECTED and row[7] == wanted
    )
