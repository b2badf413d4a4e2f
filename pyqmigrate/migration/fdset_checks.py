"""Checks of a fdset before a save or a load.

QEMU does not check descriptors that are passed in: without an ``O_DIRECT`` member it dies in the
middle of a save, and two different files in one set split the snapshot over both
(docs/internals/qemu-management.md, "Members that a migration needs"). The checks here examine a whole
set first, and their errors say what to pass instead. They change neither flags nor positions.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pyqmigrate.migration.fdset import FdsetError, FdSets

__all__ = ["Direction", "Member", "check_fdset", "describe_fdset", "same_description"]

_SYNC = os.O_SYNC  # both bits: O_DSYNC is one of them
_SYS_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "ppc64le": 354, "s390x": 343}
_KCMP_FILE = 0
_libc = ctypes.CDLL(None, use_errno=True)


class Direction(Enum):
    """The direction of the pages; the value is the access mode that a member must have."""

    SAVE = os.O_WRONLY
    LOAD = os.O_RDONLY


@dataclass(frozen=True, slots=True)
class Member:
    """A member as the kernel sees it; ``flags`` from F_GETFL, ``position`` and ``size`` in bytes.

    ``position`` is None for files without one (a pipe, a socket).
    """

    fd: int
    opaque: str | None
    flags: int
    mode: int
    device: int
    inode: int
    size: int
    position: int | None

    @property
    def access(self) -> int:
        """O_RDONLY, O_WRONLY or O_RDWR."""
        return self.flags & os.O_ACCMODE

    @property
    def direct(self) -> bool:
        """Whether the description has O_DIRECT."""
        return bool(self.flags & os.O_DIRECT)

    @property
    def sync(self) -> bool:
        """Whether the description has O_SYNC or O_DSYNC."""
        return bool(self.flags & _SYNC)

    def __str__(self) -> str:
        access = {os.O_RDONLY: "O_RDONLY", os.O_WRONLY: "O_WRONLY", os.O_RDWR: "O_RDWR"}
        words = [access.get(self.access, "no access")]
        words += ["O_DIRECT"] * self.direct
        words += ["O_SYNC" if self.flags & _SYNC == _SYNC else "O_DSYNC"] * self.sync
        label = f" ({self.opaque})" if self.opaque else ""
        return f"fd {self.fd}{label}: {'|'.join(words)}"


def describe_fdset(sets: FdSets, name: str) -> list[Member]:
    """Return what the kernel says of each member of ``/dev/fdset/N``, newest first.

    Raises FdsetError when the name or the set is wrong, or a member is no longer open.
    """
    with sets.members_of(name) as members:
        return [_look(info.fd, info.opaque) for info in members]


def check_fdset(
    sets: FdSets, name: str, direction: Direction, *, direct_io: bool, offset: int
) -> None:
    """Check that ``/dev/fdset/N`` serves a save or a load, whole.

    ``direct_io`` is the effective one (with mapped-ram and multifd both on); ``offset`` is the
    start of the stream in bytes. Demanded: a plain member of exactly the access mode of
    ``direction`` and, with direct I/O, an O_DIRECT one that is a separate open of the same
    file; no member with O_RDWR, O_SYNC or O_DSYNC, which never serve; one regular file behind
    all of them; and, with offset 0, the plain member that would be used standing at 0.

    Raises FdsetError; its text says what to hand in instead.
    """
    with sets.members_of(name) as infos:
        members = [_look(info.fd, info.opaque) for info in infos]
        _check_each(name, members, direction)
        _check_roles(name, members, direction, direct_io)
        _check_file(name, members)
        _check_position(name, members, direction, offset)


def same_description(a: int, b: int) -> bool:
    """Return whether two descriptors share one open file description (one is a ``dup()``).

    Uses kcmp(2); where that is missing or forbidden, toggles O_NONBLOCK, which means nothing
    for a regular file, and puts it back. Raises OSError for a descriptor that is not open.
    """
    number = _SYS_KCMP.get(os.uname().machine) if sys.maxsize > 2**32 else None
    if number is not None:
        pid = os.getpid()
        order = _libc.syscall(number, pid, pid, _KCMP_FILE, a, b)
        if order >= 0:
            return bool(order == 0)
    return _toggle_is_seen(a, b)


def _toggle_is_seen(a: int, b: int) -> bool:
    before_a, before_b = fcntl.fcntl(a, fcntl.F_GETFL), fcntl.fcntl(b, fcntl.F_GETFL)
    if before_a != before_b:
        return False
    fcntl.fcntl(a, fcntl.F_SETFL, before_a ^ os.O_NONBLOCK)
    try:
        return fcntl.fcntl(b, fcntl.F_GETFL) != before_b
    finally:
        fcntl.fcntl(a, fcntl.F_SETFL, before_a)


def _look(fd: int, opaque: str | None) -> Member:
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        status = os.fstat(fd)
    except OSError as refused:
        raise FdsetError(
            refused.errno or errno.EBADF, f"Failed to read file status flags for fd={fd}"
        ) from refused
    try:
        position = os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        position = None
    return Member(
        fd, opaque, flags, status.st_mode, status.st_dev, status.st_ino, status.st_size, position
    )


def _check_each(name: str, members: Sequence[Member], direction: Direction) -> None:
    for member in members:
        if member.access == os.O_RDWR:
            only = _opening(direction, direct=member.direct)
            raise _refusal(name, f"{member}; access modes must match exactly: open with {only}")
        if member.sync:
            raise _refusal(
                name, f"{member}; open without O_SYNC and O_DSYNC, and fsync after the migration"
            )
        if not stat.S_ISREG(member.mode):
            raise _refusal(name, f"fd {member.fd} is not a regular file; hand in one that is")


def _check_roles(
    name: str, members: Sequence[Member], direction: Direction, direct_io: bool
) -> None:
    serving = [member for member in members if member.access == direction.value]
    if direct_io:
        _refuse_duplicates(name, serving, direction)
    if not any(not member.direct for member in serving):
        raise _missing(name, members, direction, direct=False)
    if direct_io and not any(member.direct for member in serving):
        raise _missing(name, members, direction, direct=True)


def _refuse_duplicates(name: str, serving: Sequence[Member], direction: Direction) -> None:
    """With direct I/O a set of one description, however often duplicated, lacks the other."""
    if len(serving) < 2 or len({member.direct for member in serving}) == 2:
        return
    first, second = serving[:2]
    if same_description(first.fd, second.fd):
        raise _refusal(
            name,
            f"fd {second.fd} and fd {first.fd} are dup()s of one open file description, which is "
            f"either direct or not; open the file twice: {_opening(direction, direct=False)}, "
            f"and {_opening(direction, direct=True)}",
        )


def _check_file(name: str, members: Sequence[Member]) -> None:
    first = members[0]
    for member in members[1:]:
        if (member.device, member.inode) != (first.device, first.inode):
            raise _refusal(
                name,
                f"fd {member.fd} and fd {first.fd} are different files; "
                "open one file for all members of a set",
            )


def _check_position(
    name: str, members: Sequence[Member], direction: Direction, offset: int
) -> None:
    if offset:
        return
    plain = next(m for m in members if m.access == direction.value and not m.direct)
    if plain.position:
        raise _refusal(
            name,
            f"fd {plain.fd} is at position {plain.position:#x}, and without an offset the stream "
            f"would begin there; rewind it (lseek to 0), or give offset={plain.position:#x}",
        )


def _missing(
    name: str, members: Sequence[Member], direction: Direction, *, direct: bool
) -> FdsetError:
    kind = "O_DIRECT" if direct else "plain (not O_DIRECT)"
    held = "; it holds " + ", ".join(str(m) for m in reversed(members)) if members else ""
    return _refusal(
        name,
        f"it has no {kind} member for a {direction.name.lower()}; "
        f"add {_opening(direction, direct=direct)}{held}",
        errno.EACCES,
    )


def _opening(direction: Direction, *, direct: bool) -> str:
    mode = "O_WRONLY" if direction is Direction.SAVE else "O_RDONLY"
    return f"open(file, {mode}{'|O_DIRECT' if direct else ''})"


def _refusal(name: str, text: str, number: int = errno.EINVAL) -> FdsetError:
    return FdsetError(number, f"{name}: {text}")
