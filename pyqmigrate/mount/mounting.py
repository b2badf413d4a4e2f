"""Mount and unmount a FUSE file system: with mount(2), or with the help of fusermount3.

mount(2) works for root, and for the root of a user namespace with a mount namespace of its own. For
anybody else the setuid program fusermount3 mounts, and passes the descriptor of /dev/fuse over a socket.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.errors import NotSupported, TargetError, UsageError, target_error
from pyqmigrate.io.enclosing_store import refuse_in_store

__all__ = [
    "KIND",
    "Mounted",
    "check_mount_point",
    "check_not_in_store",
    "find_mounts",
    "mount",
    "set_read_ahead",
    "unmount",
]

KIND = "fuse.pyqmigrate"  # of the file system, in /proc/mounts

_DEVICE = "/dev/fuse"
_DEVICE_NUMBER = os.makedev(10, 229)  # Documentation/admin-guide/devices.txt
_HELPERS = ("fusermount3", "fusermount")
_READ_MAX = 1 << 20
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_LIMIT = 10.0  # seconds for fusermount3


@dataclass(frozen=True)
class Mounted:
    """A mount of this package, from /proc/self/mountinfo. ``device`` is the st_dev of its files."""

    directory: str
    source: str
    device: int
    uid: int


def check_mount_point(directory: str, used: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raise UsageError unless this is an empty directory of this user; root takes any empty one.

    ``used`` are paths that the mount itself will use: below the mount point it would wait for itself.
    """
    for path in used:
        if Path(os.path.realpath(path)).is_relative_to(directory):
            raise UsageError(
                f"{os.fspath(path)!r} is used by the mount: it must not be on {directory!r}"
            )
    if find_mounts(directory):  # before anything looks into it: its keeper may be stuck
        raise UsageError(f"{directory!r} is mounted already; see pyqmigrate mount --status")
    try:
        info = os.lstat(directory)
        if stat.S_ISLNK(info.st_mode):
            raise UsageError(f"{directory!r} is a symbolic link; mount on the directory itself")
        if not stat.S_ISDIR(info.st_mode):
            raise UsageError(f"{directory!r} is not a directory")
        if os.geteuid() not in (0, info.st_uid):
            raise UsageError(f"{directory!r} belongs to another user")
        if next(os.scandir(directory), None) is not None:
            raise UsageError(f"{directory!r} is not empty; mount on an empty directory")
    except OSError as error:
        raise target_error(error, "cannot mount on it", directory) from error


def check_not_in_store(directory: str, store: str) -> None:
    """Raise UsageError if the mount point is in the store that is to be shown, whose worker would wait for
    itself, or in another one. A store that is not a directory is fine."""
    if Path(directory).is_relative_to(os.path.realpath(store)):
        raise UsageError(f"{directory!r} is in the store itself; mount on a directory elsewhere")
    refuse_in_store(directory, "a mount point")


def mount(directory: str, source: str, *, allow_other: bool) -> int:
    """Mount a file system of this kind and return the descriptor of /dev/fuse that serves it.

    Raises TargetError; NotSupported if there is no way to mount as this user.
    """
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return _mount_with_helper(directory, source, allow_other=allow_other)
    except OSError as error:
        raise NotSupported(f"this system has no FUSE: {_DEVICE}: {error.strerror}") from None
    info = os.fstat(fd)
    if not stat.S_ISCHR(info.st_mode) or info.st_rdev != _DEVICE_NUMBER:
        os.close(fd)
        raise NotSupported(f"this system has no FUSE: {_DEVICE} is something else")
    options = (
        f"fd={fd},rootmode={stat.S_IFDIR:o},user_id={os.geteuid()},group_id={os.getegid()},"
        f"default_permissions,max_read={_READ_MAX}{',allow_other' * allow_other}"
    )
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.mount(
        os.fsencode(source),
        os.fsencode(directory),
        KIND.encode(),
        ctypes.c_ulong(flags),
        options.encode(),
    )
    if result == 0:
        return fd
    number = ctypes.get_errno()
    os.close(fd)
    if number == errno.EPERM:
        return _mount_with_helper(directory, source, allow_other=allow_other)
    if number == errno.ENODEV:
        raise NotSupported("the kernel has no FUSE: is the module fuse loaded?")
    raise TargetError(number, "cannot mount on it", directory)


def unmount(directory: str, *, lazy: bool = False) -> None:
    """Unmount; ``lazy`` takes the name away, and open files stay readable. Raises TargetError."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    if libc.umount2(os.fsencode(directory), flags) == 0:
        return
    number = ctypes.get_errno()
    helper = _find_helper()
    if number == errno.EPERM and helper is not None:
        done = _run([helper, "-u", *["-z"] * lazy, "--", directory])
        if done.returncode == 0:
            return
        if "busy" in done.stderr:
            number = errno.EBUSY
        else:
            raise TargetError(number, f"cannot unmount: {done.stderr.strip()}", directory)
    raise TargetError(number, "cannot unmount", directory)


def find_mounts(directory: str | None = None) -> list[Mounted]:
    """Return the mounts of this package that this process sees; those on ``directory`` only, if
    given. It must be an absolute path without links."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _, rest = line.rstrip("\n").partition(" - ")
            kind, source, options = rest.split(" ", 2)
            device, _, path = fields.split(" ")[2:5]
            if kind != KIND or (directory is not None and _plain(path) != directory):
                continue
            major, minor = map(int, device.split(":"))
            user = re.search(r"(?:^|,)user_id=(\d+)", options)
            found.append(
                Mounted(
                    _plain(path),
                    _plain(source),
                    os.makedev(major, minor),
                    int(user[1]) if user else 0,
                )
            )
    return found


def set_read_ahead(device: int, kib: int) -> bool:
    """Set how far the kernel reads ahead in a file system; return whether it let us (root only)."""
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(kib))
    except OSError:
        return False
    return True


def _mount_with_helper(directory: str, source: str, *, allow_other: bool) -> int:
    helper = _find_helper()
    if helper is None:
        raise NotSupported(
            "mounting needs root, a user namespace (unshare -Urm), or the program fusermount3 "
            "(package fuse3)"
        )
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    options = f"ro,nosuid,nodev,noexec,default_permissions,max_read={_READ_MAX}"
    options += f",fsname={name},subtype={KIND.partition('.')[2]}{',allow_other' * allow_other}"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = _run(
            [helper, "-o", options, "--", directory],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
        )
        theirs.close()
        if done.returncode:
            text = done.stderr.strip() or f"{helper} ended with {done.returncode}"
            raise TargetError(errno.EPERM, f"cannot mount: {text}", directory)
        ours.settimeout(_LIMIT)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return array.array("i", data[:4])[0]
    raise TargetError(errno.EPROTO, f"{helper} passed no descriptor", directory)


def _find_helper() -> str | None:
    return next((path for name in _HELPERS if (path := shutil.which(name))), None)


def _run(
    command: list[str], *, pass_fds: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT,
            check=False,
            pass_fds=pass_fds,
            env=env,
        )
    except subprocess.TimeoutExpired:
        raise TargetError(errno.ETIMEDOUT, f"{command[0]} does not end") from None
    except OSError as error:
        raise target_error(error, "cannot run", command[0]) from error


def _plain(text: str) -> str:
    r"""Return a field of mountinfo without its escapes: ``\040`` is a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
