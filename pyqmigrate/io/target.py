"""What a caller names to write to or to read from: a path, a ``file:`` URI, or descriptors."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import NamedTuple, TypeAlias

from pyqmigrate.errors import UsageError
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX
from pyqmigrate.format.uri import parse_file_uri

__all__ = [
    "Descriptors",
    "Target",
    "check_borrowed",
    "split_target",
    "stream_offset",
    "target_path",
]


class Descriptors(NamedTuple):
    """Open descriptors instead of a path. They are borrowed, and never closed here.

    ``buffered`` is without ``O_DIRECT``; ``direct`` (None: no direct I/O) is a second ``open()`` of
    the same file with it. The stream starts at ``offset`` bytes; the positions of the descriptors
    are neither used nor changed. ``scattered`` allows two different files, as QEMU does: pages are
    in ``direct``, everything else in ``buffered``.
    """

    buffered: int
    direct: int | None = None
    offset: int = 0
    scattered: bool = False


Target: TypeAlias = str | os.PathLike[str] | Descriptors


def split_target(target: Target) -> tuple[str, int]:
    """Return ``(path, offset)``; for descriptors the path is a name for messages.

    Raises UsageError.
    """
    if isinstance(target, Descriptors):
        path, offset = f"<descriptor {target.buffered}>", target.offset
    elif isinstance(target, str) and target.startswith("file:"):
        path, offset = parse_file_uri(target)
    else:
        try:
            path, offset = os.fsdecode(target), 0
        except TypeError:
            raise UsageError(
                f"a target must be a path, a file: URI or Descriptors, not {type(target).__name__}"
            ) from None
    if not isinstance(offset, int) or not 0 <= offset <= OFFSET_MAX:
        raise UsageError(f"offset {offset} is not a file position")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or b"\0" in encoded:
        raise UsageError(f"{path!r} is not the path of a file")
    return path, offset


def target_path(target: str | os.PathLike[str]) -> str:
    """Return the path in a target, without ``file:`` and offset."""
    return split_target(target)[0]


def stream_offset(target: Target) -> int:
    """Return where in its file the stream of a target starts, bytes."""
    return split_target(target)[1]


def check_borrowed(given: Descriptors, *, writing: bool) -> None:
    """Raise UsageError unless a save (or load) can use the descriptors."""
    verb, wanted = ("write", "O_WRONLY") if writing else ("read", "O_RDONLY")
    useless = os.O_RDONLY if writing else os.O_WRONLY
    infos = []
    for fd, direct in ((given.buffered, False), (given.direct, True)):
        if fd is None:
            continue
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            info = os.fstat(fd)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"descriptor {fd} cannot be used: {error}") from None
        device = stat.S_ISBLK(info.st_mode) and not writing
        if not (stat.S_ISREG(info.st_mode) or device):
            raise UsageError(f"descriptor {fd} is not a regular file; a snapshot needs one")
        if flags & os.O_ACCMODE == useless:
            raise UsageError(f"descriptor {fd} cannot {verb}; open it with {wanted}")
        if bool(flags & os.O_DIRECT) != direct:
            has = "has" if flags & os.O_DIRECT else "lacks"
            raise UsageError(
                f"descriptor {fd} {has} O_DIRECT; pass two separate open()s of the file, "
                "buffered without it and direct with it (a dup() shares its flags)"
            )
        if writing and flags & os.O_APPEND:
            raise UsageError(f"descriptor {fd} has O_APPEND, which ignores file positions")
        infos.append((info.st_dev, info.st_ino))
    if len(set(infos)) > 1 and not given.scattered:
        raise UsageError(
            f"descriptors {given.buffered} and {given.direct} are different files; "
            "open the same one twice"
        )
