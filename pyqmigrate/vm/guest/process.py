"""Find the process of a QEMU, and read its address space.

QEMU's own answers are untrusted (:mod:`pyqmigrate.vm.qemu.peer`): a process is accepted if it is at
the other end of the monitor's connection, has the threads of the guest's CPUs, and has memory
mapped wherever QEMU reports a RAM block. Thread numbers are those of QEMU's own pid
namespace (``NSpid`` in ``/proc/PID/status``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pyqmigrate.errors import GuestMemoryError, UsageError
from pyqmigrate.io.maps_file import read_maps
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.peer import Peer, read_status

__all__ = [
    "Mapping",
    "Process",
    "command_of",
    "covering",
    "find_process",
    "host_threads",
    "open_mapped",
    "read_mappings",
]

_PROC = Path("/proc")
_UNKNOWN = (
    "the process of this QEMU was not found: it may be on another machine, or in a pid namespace "
    "that is not visible from here"
)


@dataclass(frozen=True)
class Mapping:
    """A line of ``/proc/PID/maps``: ``start`` to ``end`` (exclusive) maps a file at ``offset``."""

    start: int
    end: int
    readable: bool
    shared: bool
    offset: int
    device: int
    inode: int
    path: str


class Process:
    """A QEMU's process at the other end of ``peer``, held by a pidfd; close it."""

    def __init__(self, pid: int, peer: Peer) -> None:
        """Raises ProcessLookupError if it has ended."""
        self.pid = pid
        self._peer = peer
        self._fd = -1
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise
        except OSError:
            pass  # a kernel without pidfds: only the number is left

    def why_not(self) -> str | None:
        """Return why it is not the other end of the connection now, or None if it is."""
        why_not = self._peer.why_not(self.pid)
        # Checked last: while the process lives, its pid is not reused.
        if self._fd >= 0 and select.select([self._fd], [], [], 0)[0]:
            return f"process {self.pid} has ended"
        return why_not

    def check(self) -> None:
        """Raise GuestMemoryError unless it is still the other end of the connection.

        Call it after reading its memory: it may have executed another program since then.
        """
        if (why_not := self.why_not()) is not None:
            raise GuestMemoryError(
                errno.EPERM, f"the memory that was read may not be the guest's: {why_not}"
            )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def find_process(
    peer: Peer, threads: Iterable[int], fits: Callable[[Sequence[Mapping]], bool]
) -> tuple[Process | None, str]:
    """Return the process at the other end of ``peer`` that has these threads and whose address
    space ``fits``; or the reason why it was not found.

    If the listener has these threads but may not be inspected further, both are returned.
    ``threads`` are numbered as in the process's own pid namespace.
    """
    wanted = frozenset(threads)
    reasons: list[str] = []
    seen: set[int] = set()
    for pid in _candidates(peer.pid, wanted):
        if pid in seen or not wanted <= _own_numbers(pid):
            continue
        seen.add(pid)
        with contextlib.suppress(ProcessLookupError):
            process = Process(pid, peer)
            why_not = _why_not(process, fits)
            if why_not is None:
                return process, ""
            reasons.append(why_not)
            process.close()
    why_not = reasons[0] if reasons else _why_unknown(peer)
    if peer.pid in seen and wanted and not os.access(_PROC / str(peer.pid) / "fd", os.R_OK):
        with contextlib.suppress(ProcessLookupError):
            return Process(peer.pid, peer), why_not
    return None, why_not


def _why_not(process: Process, fits: Callable[[Sequence[Mapping]], bool]) -> str | None:
    if (why_not := process.why_not()) is not None:
        return why_not
    try:
        if fits(read_mappings(process.pid)):
            return None
    except OSError as error:
        return (
            f"/proc/{process.pid}/maps cannot be read ({error.strerror}): run as the user of "
            "QEMU, or as root (CAP_SYS_PTRACE)"
        )
    return f"process {process.pid} has no memory where QEMU reports its RAM"


def _why_unknown(peer: Peer) -> str:
    if peer.pid is None:
        return _UNKNOWN
    try:
        name = (_PROC / str(peer.pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return _UNKNOWN
    return (
        f"process {peer.pid} ({name}), which listens on the monitor's socket, does not have the "
        "threads that QEMU names, and no process that has them is at the other end of the "
        "connection (a program in between, such as socat?)"
    )


def _candidates(peer: int | None, threads: frozenset[int]) -> Iterator[int]:
    if peer is not None:
        yield peer
    for thread in sorted(threads):
        leader = read_status(_PROC / str(thread)).get("Tgid")
        if leader:
            yield int(leader[0])
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and len(read_status(entry).get("NSpid", ())) > 1:
            yield int(entry.name)


def _own_numbers(pid: int) -> set[int]:
    """Return the thread ids of a process, as in its own pid namespace."""
    try:
        tasks = list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return set()
    return {int(numbers[-1]) for task in tasks if (numbers := read_status(task).get("NSpid"))}


def host_threads(pid: int, own: Iterable[int]) -> list[int]:
    """Return the threads of a process, as numbered here, that have the numbers ``own`` in its own pid
    namespace; empty unless all are found."""
    wanted = set(own)
    try:
        tasks = list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return []
    found = [
        int(task.name)
        for task in tasks
        if (numbers := read_status(task).get("NSpid")) and int(numbers[-1]) in wanted
    ]
    return found if len(found) == len(wanted) else []


def command_of(pid: int) -> CommandLine | None:
    """Return the command line that a QEMU was started with; None if it cannot be read."""
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")[:-1]
        return CommandLine.parse([os.fsdecode(word) for word in words])
    except (OSError, UsageError):
        return None


def read_mappings(pid: int) -> list[Mapping]:
    """Return the address space of a process, in order. OSError if that is not permitted."""
    return [_mapping(line) for line in read_maps(pid)]


def _mapping(line: str) -> Mapping:
    fields = line.split(maxsplit=5)
    start, end = (int(address, 16) for address in fields[0].split("-"))
    major, minor = (int(number, 16) for number in fields[3].split(":"))
    return Mapping(
        start,
        end,
        readable=fields[1][0] == "r",
        shared=fields[1][3] == "s",
        offset=int(fields[2], 16),
        device=os.makedev(major, minor),
        inode=int(fields[4]),
        path=fields[5] if len(fields) == 6 else "",
    )


def covering(mappings: Sequence[Mapping], address: int, length: int) -> list[Mapping]:
    """Return the mappings that cover ``length`` bytes from ``address``; empty if there is a gap."""
    inside = [m for m in mappings if m.start < address + length and m.end > address]
    if not inside or inside[0].start > address or inside[-1].end < address + length:
        return []
    gapless = all(left.end == right.start for left, right in pairwise(inside))
    return inside if gapless else []


def open_mapped(pid: int, mapping: Mapping) -> int:
    """Open the file behind a mapping for reading; return a new descriptor.

    ``/proc/PID/map_files`` is the file itself, but needs root. Otherwise QEMU's own descriptors and
    the path (as this process and as QEMU see it) are tried; the file is compared with the mapping
    before it is opened. Raises the last OSError if none opens.
    """
    process = _PROC / str(pid)
    failure = FileNotFoundError(2, "its file has no usable name", mapping.path)
    exact = process / "map_files" / f"{mapping.start:x}-{mapping.end:x}"
    for name in (exact, *_names(process, mapping)):
        try:
            return _open_if(name, None if name is exact else mapping)
        except OSError as error:
            failure = error  # type: ignore[assignment]
    raise failure


def _open_if(name: Path, mapping: Mapping | None) -> int:
    """Open the file with this name, if it is that of ``mapping``."""
    fd = os.open(name, os.O_PATH | os.O_CLOEXEC)
    try:
        path = Path(f"/proc/self/fd/{fd}")
        if mapping is not None and not _is_file_of(os.fstat(fd), path, mapping):
            raise FileNotFoundError(2, "another file has this name", os.fspath(name))
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _names(process: Path, mapping: Mapping) -> Iterator[Path]:
    try:
        own = sorted((process / "fd").iterdir(), key=lambda entry: int(entry.name))
    except OSError:
        own = []
    for entry in own:
        # A descriptor opened with O_PATH does not prove read permission.
        if not _flags(process / "fdinfo" / entry.name) & os.O_PATH:
            yield entry
    yield from (Path(mapping.path), Path(f"{process}/root{mapping.path}"))


def _flags(information: Path) -> int:
    """Return the flags of a descriptor, from its /proc/PID/fdinfo."""
    with contextlib.suppress(OSError, ValueError):
        for line in information.read_text().splitlines():
            if line.startswith("flags:"):
                return int(line.split()[1], 8)
    return os.O_PATH


def _is_file_of(info: os.stat_result, path: Path, mapping: Mapping) -> bool:
    if (info.st_dev, info.st_ino) == (mapping.device, mapping.inode):
        return True
    # File systems with several volumes report different device numbers in maps and in stat.
    return info.st_ino == mapping.inode and os.fspath(path.readlink()) == mapping.path
