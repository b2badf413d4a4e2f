"""Memory of another process, such as a QEMU without shared guest memory. For saves only.

It is read with ``process_vm_readv``, which needs the privileges of a debugger: root, or
``CAP_SYS_PTRACE``, or the same user if neither Yama nor the process itself forbids it.

Private anonymous memory that the process never touched is not read, because reading it would
allocate its pages and page tables. ``/proc/PID/pagemap`` shows which pages these are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyqmigrate._core as _core
from pyqmigrate.errors import GuestMemoryError, UsageError
from pyqmigrate.io.maps_file import read_maps

__all__ = ["ProcessMemory", "ProcessSource"]

_END = 1 << 64
_WHAT = "cannot read the memory of process"
# Start, end, shared or private, inode, name.
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...([sp]) \S+ \S+ (\d+) *(.*)")


@dataclass(frozen=True)
class ProcessMemory:
    """Guest memory in another process, for saves: ``length`` bytes from its ``address`` on.

    QEMU shows the addresses of its RAM blocks with ``info ramblock``. The process must not change
    the memory, nor map anything else there, while it is read. Give shared memory as a
    :class:`~pyqmigrate.io.memory.FileMemory` if you can open its file: reading it through the
    process fills its holes.
    """

    pid: int
    address: int
    length: int

    def refusal(self) -> GuestMemoryError | None:
        """Return why the memory cannot be read (its errno is EPERM, ESRCH or EFAULT), or None if
        the first and the last byte can be read."""
        try:
            ProcessSource(self).close()
        except GuestMemoryError as error:
            return error
        return None


class ProcessSource:
    """The memory of a process, for the core's ``qm_process_fill`` and ``qm_process_next``.

    ``core`` is their argument; ``skips`` is whether the second may be used. The end of the process
    is noticed even if its PID is reused. Raises UsageError for an invalid range, GuestMemoryError if
    it cannot be read; ``block`` is for its message.
    """

    def __init__(self, memory: ProcessMemory, block: str | None = None) -> None:
        _check(memory)
        self._block = block
        self._pid = memory.pid
        self._fds = contextlib.ExitStack()
        try:
            self.core: Any = _core.ffi.new("struct qm_process *")
            self.core.pid, self.core.address = memory.pid, memory.address
            self.core.pidfd = self._open(os.pidfd_open, memory.pid)
            self.core.pagemap = -1
            self._probe(0)
            self._probe(memory.length - 1)
            self.skips = self._find_pagemap(memory)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        self._fds.close()

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from byte ``offset`` on, which must be inside. Raises
        GuestMemoryError."""
        buffer = _core.ffi.new("char[]", length)
        got = _core.lib.qm_process_fill(self.core, buffer, offset, length)
        if got != length:
            raise self._refused(-got if got < 0 else errno.EFAULT)
        return bytes(_core.ffi.buffer(buffer))

    def _open(self, opener: Any, *arguments: Any) -> int:
        try:
            fd: int = opener(*arguments)
        except OSError as error:
            raise self._refused(error.errno or errno.EIO) from error
        self._fds.callback(os.close, fd)
        return fd

    def _probe(self, offset: int) -> None:
        self.read(offset, 1)

    def _refused(self, number: int) -> GuestMemoryError:
        what = f"{_WHAT} {self._pid}"
        if number == errno.EPERM:
            what += " (it takes CAP_SYS_PTRACE, or its user and a kernel that lets users trace)"
        return GuestMemoryError(number, what, block=self._block)

    def _find_pagemap(self, memory: ProcessMemory) -> bool:
        """Open the pagemap if absent pages are zeros, and the memory is large enough."""
        try:
            if memory.length < _core.lib.QM_CHUNK or not _is_anonymous(memory):
                return False
            self.core.pagemap = self._open(
                os.open, f"/proc/{memory.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC
            )
        except OSError:
            return False
        self.core.has_scan = _core.lib.qm_process_can_scan(self.core.pagemap)
        self._probe(0)  # the pagemap, opened by PID, is that of the process only if it still runs
        return True


def _check(memory: ProcessMemory) -> None:
    pid, address, length = memory.pid, memory.address, memory.length
    if not all(type(value) is int for value in (pid, address, length)):
        raise UsageError(f"{memory} has something that is not a whole number")
    if not 0 < pid < 1 << 31:
        raise UsageError(f"{pid} is not the number of a process")
    if length <= 0 or address < 0 or address + length > _END:
        raise UsageError(f"no process has {length} bytes at address {address:#x}")


def _is_anonymous(memory: ProcessMemory) -> bool:
    """Return whether all of it is mapped, private and anonymous."""
    address, end = memory.address, memory.address + memory.length
    for start, stop, anonymous in _mappings(memory.pid):
        if stop <= address:
            continue
        if start > address or not anonymous:
            return False
        address = stop
        if address >= end:
            return True
    return False


def _mappings(pid: int) -> Iterator[tuple[int, int, bool]]:
    """Yield start, end, and whether it is private and anonymous, of each mapping, ascending."""
    for line in read_maps(pid):
        found = _MAPPING.match(line)
        if found is None:
            continue
        start, stop, sharing, inode, name = found.groups()
        named = name not in ("", "[heap]") and not name.startswith("[anon:")
        yield int(start, 16), int(stop, 16), sharing == "p" and inode == "0" and not named
