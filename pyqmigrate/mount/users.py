"""Which processes use a mount: those that keep it from being unmounted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["User", "users_of"]


class User(NamedTuple):
    """A process with an open or mapped file, or with its current directory there."""

    pid: int
    command: str


def users_of(directory: str) -> list[User]:
    """Return the processes that use the mount on ``directory``, as far as this user sees them."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and any(_is_inside(path, directory) for path in _paths_of(name)):
            comm = f"/proc/{name}/comm"
            with (
                contextlib.suppress(OSError),
                open(comm, encoding="utf-8", errors="replace") as file,
            ):
                found.append(User(int(name), file.read().rstrip("\n")))
    return found


def _paths_of(process: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield os.readlink(f"/proc/{process}/cwd")
    for place in ("fd", "map_files"):
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{process}/{place}"):
                with contextlib.suppress(OSError):
                    yield os.readlink(f"/proc/{process}/{place}/{name}")


def _is_inside(path: str, directory: str) -> bool:
    return path == directory or path.startswith(f"{directory}/")
