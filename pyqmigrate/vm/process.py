"""Which process a QEMU is, and what its address space looks like.

A monitor's socket names the process that called listen(), and that may be a manager which handed
the socket on. The threads that run the guest's processors are QEMU's own, and so are the addresses
of its RAM blocks: a process is believed when it has both. Thread numbers are those of QEMU's own
pid namespace (``NSpid`` in ``/proc/PID/status`` tells them).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

__all__ = ["Ending", "Mapping", "covering", "find_process", "open_mapped", "read_mappings"]

_PROC = Path("/proc")


@dataclass(frozen=True)
class Mapping:
    """A line of ``/proc/PID/maps``: ``start`` to ``end`` (exclusive) shows a file at ``offset``."""

    start: int
    end: int
    readable: bool
    shared: bool
    offset: int
    device: int
    inode: int
    path: str


def find_process(
    peer: int | None, threads: Iterable[int], addresses: Iterable[int] = ()
) -> int | None:
    """The process that has these threads, and something mapped at each of these addresses.

    ``peer`` is tried first, and its addresses are not asked about where it does not let us look.
    ``threads`` are numbered as in the process's own pid namespace. The result is a number of ours,
    or None.
    """
    wanted, mapped = frozenset(threads), tuple(addresses)
    seen: set[int] = set()
    for pid in _candidates(peer, wanted):
        if pid in seen or not wanted <= _own_numbers(pid):
            continue
        seen.add(pid)
        try:
            if _has_mapped(pid, mapped):
                return pid
        except OSError:
            if pid == peer and wanted:
                return pid
    return None


def _candidates(peer: int | None, threads: frozenset[int]) -> Iterator[int]:
    if peer is not None:
        yield peer
    for thread in sorted(threads):
        leader = _status(_PROC / str(thread)).get("Tgid")
        if leader:
            yield int(leader[0])
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and len(_status(entry).get("NSpid", ())) > 1:
            yield int(entry.name)


def _own_numbers(pid: int) -> set[int]:
    """The numbers of a process's threads, as it sees them itself."""
    try:
        tasks = list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return set()
    return {int(numbers[-1]) for task in tasks if (numbers := _status(task).get("NSpid"))}


def _status(process: Path) -> dict[str, list[str]]:
    try:
        lines = (process / "status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}


def _has_mapped(pid: int, addresses: Iterable[int]) -> bool:
    space = read_mappings(pid)
    return bool(space) and all(any(m.start <= at < m.end for m in space) for at in addresses)


def read_mappings(pid: int) -> list[Mapping]:
    """The address space of a process, in order. OSError where that is not allowed."""
    lines = (_PROC / str(pid) / "maps").read_text(errors="surrogateescape").splitlines()
    return [_mapping(line) for line in lines]


def _mapping(line: str) -> Mapping:
    fields = line.split(maxsplit=5)
    start, end = (int(address, 16) for address in fields[0].split("-"))
    major, minor = (int(number, 16) for number in fields[3].split(":"))
    return Mapping(
        start, end, readable=fields[1][0] == "r", shared=fields[1][3] == "s",
        offset=int(fields[2], 16), device=os.makedev(major, minor), inode=int(fields[4]),
        path=fields[5] if len(fields) == 6 else "",
    )  # fmt: skip


def covering(mappings: Sequence[Mapping], address: int, length: int) -> list[Mapping]:
    """The mappings from ``address`` on, ``length`` bytes without a gap; empty if there is one."""
    found = [m for m in mappings if m.start < address + length and m.end > address]
    if not found or found[0].start > address or found[-1].end < address + length:
        return []
    gapless = all(left.end == right.start for left, right in pairwise(found))
    return found if gapless else []


def open_mapped(pid: int, mapping: Mapping) -> int:
    """A new read-only descriptor of the file behind a mapping, under whichever name it has one.

    Names are tried in the order of the privilege that they need: QEMU's own descriptors, the path
    (as we and as QEMU see it), ``/proc/PID/map_files``. Raises the last OSError when none opens.
    """
    process = _PROC / str(pid)
    failure = FileNotFoundError(2, "no name leads to it", mapping.path)
    for name in _names(process, mapping):
        try:
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            failure = error  # type: ignore[assignment]
    raise failure


def _names(process: Path, mapping: Mapping) -> Iterator[Path]:
    try:
        own = sorted((process / "fd").iterdir(), key=lambda entry: int(entry.name))
    except OSError:
        own = []
    paths = (Path(mapping.path), Path(f"{process}/root{mapping.path}"))
    yield from (name for name in (*own, *paths) if _is_file_of(name, mapping))
    yield process / "map_files" / f"{mapping.start:x}-{mapping.end:x}"


def _is_file_of(name: Path, mapping: Mapping) -> bool:
    try:
        info = name.stat()
        if (info.st_dev, info.st_ino) == (mapping.device, mapping.inode):
            return True
        # File systems of several volumes show one device number here and another there.
        return info.st_ino == mapping.inode and os.fspath(name.readlink()) == mapping.path
    except OSError:
        return False


class Ending:
    """The end of a process that is there now; close it.

    ``known`` is false where it cannot be waited for: a kernel without pidfds, or no number.
    """

    def __init__(self, pid: int | None) -> None:
        self._fd = -1
        self._ended = False
        try:
            self._fd = -1 if pid is None else os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended = True
        except OSError:
            pass

    @property
    def known(self) -> bool:
        return self._ended or self._fd >= 0

    async def wait(self, timeout: float) -> bool:
        """Whether it came within ``timeout`` seconds. A zombie has ended."""
        if self._fd < 0:
            return self._ended
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._fd, ended.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await ended.wait()
        finally:
            loop.remove_reader(self._fd)
        return ended.is_set()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
