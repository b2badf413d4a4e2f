"""Numbered sets of file descriptors, addressed as ``/dev/fdset/N``.

A manager that may open a file passes its descriptors to a program that may not. Each set has a number;
each open takes a member of exactly the right access mode, with or without ``O_DIRECT``, and borrows a
duplicate of it::

    with FdSets() as sets:
        sets.add(os.open(path, os.O_WRONLY), fdset_id=1)
        sets.add(os.open(path, os.O_WRONLY | os.O_DIRECT), fdset_id=1)
        with sets.open("/dev/fdset/1", os.O_WRONLY | os.O_DIRECT) as file:
            os.pwrite(file.fileno(), page, 0)
        sets.remove(1)

Direct I/O needs two members, because an open file description is either direct or not: small writes
of odd sizes use the plain one. They must come from two ``os.open`` calls, since a ``dup()`` shares its
flags and its position with the original.

The rules are those of QEMU 9.1 and later (docs/internals/qemu-management.md, "Opening a fdset"), and
so are the texts of the errors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from pyqmigrate.errors import PyqmigrateError

__all__ = [
    "AddedFd",
    "FdInfo",
    "FdSets",
    "FdsetError",
    "FdsetFile",
    "FdsetInfo",
    "fdset_number",
    "is_fdset_name",
]

PREFIX = "/dev/fdset/"
_MATCH = os.O_ACCMODE | os.O_DIRECT
_NUMBER = re.compile(r"[ \t\n\v\f\r]*(?:\+?[0-9]+|-0+)", re.ASCII)
_INT_MAX = 2**31 - 1
_ID_MAX = 2**63 - 1


class FdsetError(PyqmigrateError, OSError):
    """A set or a member is missing or does not match; ``errno`` is the kind of refusal.

    The text is QEMU's, without the errno. ``flags`` are those of the failed open.
    """

    def __init__(self, errno: int, text: str, flags: int = 0) -> None:
        super().__init__(errno, text)
        self.flags = flags

    def __str__(self) -> str:
        return str(self.strerror)


class AddedFd(NamedTuple):
    """The set and the member number of an added descriptor."""

    fdset_id: int
    fd: int


class FdInfo(NamedTuple):
    """One member, as a query shows it."""

    fd: int
    opaque: str | None = None


class FdsetInfo(NamedTuple):
    """One set, as a query shows it; ``fds`` is empty if only loans keep it alive."""

    fdset_id: int
    fds: tuple[FdInfo, ...]


@dataclass(slots=True)
class _Set:
    members: list[FdInfo] = field(default_factory=list)  # oldest first
    loans: set[FdsetFile] = field(default_factory=set)


class FdSets:
    """A collection of fdsets, of which a QEMU process has one.

    It owns the descriptors added to it and closes each exactly once: at ``remove``, or at
    ``close``. Duplicates from ``open`` belong to the caller, and outlive both. All methods may be
    called from any thread; they block only on the collection's lock and on closing files.
    """

    def __init__(self) -> None:
        self._sets: dict[int, _Set] = {}
        self._lock = threading.Lock()
        self._closed = False

    def add(self, fd: int, fdset_id: int | None = None, opaque: str | None = None) -> AddedFd:
        """Add ``fd`` to a set, which is created if it does not exist; without an id, to a new set
        with the lowest free id. ``opaque`` is any text, shown by ``query``.

        The set then owns ``fd``, which becomes close-on-exec. If the call raises, the caller still
        owns it. The type of the file is not checked.

        Raises FdsetError: EINVAL for an id outside 0 to 2**63 - 1 or after ``close``, EBADF for
        a descriptor that is not open, EEXIST for one that a set owns already.
        """
        if fdset_id is not None and not 0 <= fdset_id <= _ID_MAX:
            raise FdsetError(errno.EINVAL, "Parameter 'fdset-id' expects a non-negative value")
        with self._lock:
            if self._closed:
                raise FdsetError(errno.EINVAL, "these fdsets are closed")
            owner = self._owner(fd)
            if owner is not None:
                raise FdsetError(errno.EEXIST, f"fd {fd} already belongs to fdset {owner}")
            try:
                os.set_inheritable(fd, False)
            except OSError as refused:
                raise FdsetError(
                    refused.errno or errno.EBADF, f"fd {fd}: {refused.strerror}"
                ) from None
            if fdset_id is None:
                fdset_id = next(n for n in range(len(self._sets) + 1) if n not in self._sets)
            self._sets.setdefault(fdset_id, _Set()).members.append(FdInfo(fd, opaque))
        return AddedFd(fdset_id, fd)

    def remove(self, fdset_id: int, fd: int | None = None) -> None:
        """Close one member of a set, or all of them.

        Loans are not affected; the set stays visible, empty, until the last one ends.

        Raises FdsetError (ENOENT) for an unknown set or member.
        """
        with self._lock:
            entry = self._sets.get(fdset_id)
            gone = [m for m in entry.members if fd is None or m.fd == fd] if entry else []
            if entry is None or (fd is not None and not gone):
                which = f"fdset-id:{fdset_id}" + ("" if fd is None else f", fd:{fd}")
                raise FdsetError(errno.ENOENT, f"File descriptor named '{which}' not found")
            entry.members = [m for m in entry.members if m not in gone]
            self._drop_if_unused(fdset_id)
            # Closed under the lock: the number could be given out and added again at once.
            for member in gone:
                _close(member.fd)

    def query(self) -> list[FdsetInfo]:
        """Return the sets as QEMU lists them: highest id first, members in order of addition."""
        with self._lock:
            return [
                FdsetInfo(fdset_id, tuple(self._sets[fdset_id].members))
                for fdset_id in sorted(self._sets, reverse=True)
            ]

    def open(self, name: str, flags: int) -> FdsetFile:
        """Borrow a duplicate of the member of ``/dev/fdset/N`` that matches ``flags``.

        ``flags`` are those of ``os.open``. The newest member with exactly the same access mode and
        ``O_DIRECT`` is taken; then ``O_SYNC`` and ``O_DSYNC`` must be equal too. The flags are set on
        the duplicate, and hence on the member, which shares its description: ``O_APPEND`` is cleared
        unless ``flags`` have it. ``O_TRUNC``, or ``O_CREAT`` with ``O_EXCL``, truncates the file. The
        file position is the member's.

        Closing the result ends the loan. Raises FdsetError: EINVAL for an invalid name, ENOENT for
        an unknown set, EACCES if no member matches, or the errno of the failed duplication.
        """
        wanted = flags & ~os.O_CLOEXEC
        with self._lock:
            number = fdset_number(name)
            entry = self._sets.get(number)
            if entry is None:
                raise FdsetError(errno.ENOENT, f"Failed to find fdset {PREFIX}{number}", wanted)
            fd = _matching_member(entry, wanted)
            try:
                duplicate = _duplicate(fd, wanted)
            except OSError as refused:
                raise FdsetError(
                    refused.errno or errno.EINVAL,
                    f"Failed to dup() given file descriptor fd={fd}",
                    wanted,
                ) from refused
            file = FdsetFile(self, number, duplicate, name)
            entry.loans.add(file)
        return file

    def close(self) -> None:
        """Close every member of every set; loans last until their holders end them."""
        with self._lock:
            self._closed = True
            for fdset_id, entry in list(self._sets.items()):
                members, entry.members = entry.members, []
                self._drop_if_unused(fdset_id)
                for member in members:
                    _close(member.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def members_of(self, name: str) -> Iterator[tuple[FdInfo, ...]]:
        """Yield the members of ``/dev/fdset/N``, newest first, and lock them while the block runs.

        They can be inspected without a loan. The block must not call other methods of this object.
        Raises FdsetError as ``open`` does for the name and the set.
        """
        with self._lock:
            number = fdset_number(name)
            entry = self._sets.get(number)
            if entry is None:
                raise FdsetError(errno.ENOENT, f"Failed to find fdset {PREFIX}{number}")
            yield tuple(reversed(entry.members))

    def _return(self, file: FdsetFile) -> None:
        with self._lock:
            entry = self._sets[file.fdset_id]
            entry.loans.discard(file)
            self._drop_if_unused(file.fdset_id)

    def _drop_if_unused(self, fdset_id: int) -> None:
        entry = self._sets[fdset_id]
        if not entry.members and not entry.loans:
            del self._sets[fdset_id]

    def _owner(self, fd: int) -> int | None:
        for fdset_id, entry in self._sets.items():
            if any(member.fd == fd for member in entry.members):
                return fdset_id
        return None


class FdsetFile:
    """A descriptor borrowed from a fdset; ``close`` ends the loan. A context manager."""

    def __init__(self, sets: FdSets, fdset_id: int, fd: int, name: str) -> None:
        self.fdset_id = fdset_id
        self.name = name
        self._sets = sets
        self._fd = fd
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether the loan has ended."""
        return self._fd < 0

    def fileno(self) -> int:
        """Return the descriptor's number. Raises ValueError after ``close``."""
        if self._fd < 0:
            raise ValueError(f"{self.name} is closed")
        return self._fd

    def close(self) -> None:
        """Close the duplicate and end the loan. Idempotent.

        Raises OSError if the system reports a late write error; the loan has ended then too.
        """
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                os.close(fd)
            finally:
                self._sets._return(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FdsetFile {self.name} {'closed' if self.closed else f'fd={self._fd}'}>"


def is_fdset_name(path: str) -> bool:
    """Return whether ``path`` names a fdset instead of a file."""
    return path.startswith(PREFIX)


def fdset_number(name: str) -> int:
    """Return N of ``/dev/fdset/N``, 0 to 2**31 - 1 (sets above that cannot be opened).

    Raises FdsetError (EINVAL) for anything else.
    """
    digits = name.removeprefix(PREFIX)
    if is_fdset_name(name) and _NUMBER.fullmatch(digits):
        # int() refuses very long texts; eleven significant digits are already too large.
        number = int(digits.strip().lstrip("+-0")[:11] or "0")
        if number <= _INT_MAX:
            return number
    raise FdsetError(errno.EINVAL, f"Could not parse fdset {name}")


def _matching_member(entry: _Set, wanted: int) -> int:
    for member in reversed(entry.members):
        try:
            flags = fcntl.fcntl(member.fd, fcntl.F_GETFL)
        except OSError as refused:
            raise FdsetError(
                refused.errno or errno.EBADF,
                f"Failed to read file status flags for fd={member.fd}",
                wanted,
            ) from refused
        if flags & _MATCH == wanted & _MATCH:
            return member.fd
    raise FdsetError(
        errno.EACCES, f"Failed to find file descriptor with matching flags={wanted:#x}", wanted
    )


def _duplicate(fd: int, wanted: int) -> int:
    """Duplicate ``fd`` with these status flags. Raises OSError, and then leaks nothing."""
    duplicate = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    try:
        if (fcntl.fcntl(duplicate, fcntl.F_GETFL) ^ wanted) & os.O_SYNC:
            raise OSError(errno.EINVAL, "O_SYNC or O_DSYNC differs from what is asked for")
        fcntl.fcntl(duplicate, fcntl.F_SETFL, wanted)
        exclusive = os.O_CREAT | os.O_EXCL
        if wanted & os.O_TRUNC or wanted & exclusive == exclusive:
            os.ftruncate(duplicate, 0)
    except BaseException:
        os.close(duplicate)
        raise
    return duplicate


def _close(fd: int) -> None:
    # A member was never written through its own number; a late error belongs to the loans.
    with contextlib.suppress(OSError):
        os.close(fd)
