"""How much memory this process can still use without harm to the host or to its cgroup.

The kernel ends a process when a host, or a group of processes with a limit, runs out of memory. That may
be the guest that is being saved. So the available memory is what is left of the tightest limit: the
host's (``MemAvailable`` of /proc/meminfo), and for each cgroup from the process's own up to the root
``memory.max`` and ``memory.high`` (cgroup v2), or ``memory.limit_in_bytes`` (v1). Pages of the page
cache that the kernel can drop (``inactive_file`` of ``memory.stat``) count as available.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["available_memory"]

_V1_LIMIT = "memory.limit_in_bytes"


def available_memory(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the bytes of memory that are available to this process; None if that is unknown.

    ``proc`` and ``cgroups`` are where those file systems are mounted. A limit that cannot be read
    is passed over.
    """
    left = [*_of_host(proc), *_of_cgroups(proc, cgroups)]
    return min(left, default=None)


def _of_host(proc: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (proc / "meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                yield int(rest.split()[0]) * 1024


def _of_cgroups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Yield what is left of each limit. Version 2 has the controller number 0 and no names."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            for directory in _upwards(cgroups, path):
                for limit in ("memory.max", "memory.high"):
                    yield from _left(directory, limit, "memory.current", "inactive_file")
        elif "memory" in names.split(","):
            for directory in _upwards(cgroups / "memory", path):
                yield from _left(
                    directory, _V1_LIMIT, "memory.usage_in_bytes", "total_inactive_file"
                )


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """Yield the directory of a cgroup and of its parents. If only a part of the tree is mounted (in a
    container), not all of them exist; a cgroup outside of the namespace has ``..`` in its path."""
    inside = PurePosixPath(path.lstrip("/"))
    if ".." in inside.parts:
        inside = PurePosixPath()
    for part in (inside, *inside.parents):
        yield root / part


def _left(directory: Path, limit: str, usage: str, droppable: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        allowed = (directory / limit).read_text().strip()
        if allowed == "max":
            return
        used = int((directory / usage).read_text())
        yield max(int(allowed) - used + _statistic(directory, droppable), 0)


def _statistic(directory: Path, wanted: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in (directory / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == wanted:
                return int(value)
    return 0
