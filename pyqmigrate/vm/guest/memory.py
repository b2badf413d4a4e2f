"""Find out how the RAM blocks of a running QEMU can be read.

Shared memory is read through the mapped file, private memory with ``process_vm_readv``, if that is
permitted.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Table
from dataclasses import dataclass

from pyqmigrate.io.memory import FileMemory, Memory
from pyqmigrate.io.process_memory import ProcessMemory
from pyqmigrate.vm.guest.process import Mapping, covering, open_mapped, read_mappings
from pyqmigrate.vm.guest.ramblock import RamLine

__all__ = ["Backend", "GuestBlock", "find_memory", "fits"]


@dataclass(frozen=True)
class Backend:
    """A memory backend: its QOM type, its size in bytes, and whether it is shared."""

    type: str
    size: int
    share: bool


@dataclass(frozen=True)
class GuestBlock:
    """A RAM block of a running QEMU that a stream would contain.

    ``length`` is in bytes, ``page_size`` that of the backend's host pages, not the guest's.
    ``memory`` is None if it cannot be read, and ``why_not`` is the reason; its descriptor belongs
    to the :class:`pyqmigrate.vm.guest.inspect.GuestInfo`. ``backend`` is the QOM type, empty for
    memory that QEMU allocated itself. ``file_backed``:
    ``x-ignore-shared`` leaves it out of the stream.
    """

    name: str
    length: int
    page_size: int
    host_address: int
    memory: Memory | None
    shared: bool
    file_backed: bool
    backend: str = ""
    why_not: str = ""


def fits(
    lines: Iterable[RamLine], backends: Table[str, Backend], mappings: Sequence[Mapping]
) -> bool:
    """Return whether every block is mapped at the address that QEMU reports.

    Memory of a backend must be shared or private as the backend is. Blocks without an address are
    skipped.
    """
    for line in lines:
        place = covering(mappings, line.host_address, line.length)
        backend = _backend_of(line, backends)
        if line.host_address == 0:
            continue
        if not place or (backend is not None and any(m.shared != backend.share for m in place)):
            return False
    return True


def find_memory(
    lines: Iterable[RamLine], backends: Table[str, Backend], pid: int | None, why_no_pid: str = ""
) -> list[GuestBlock]:
    """Return the blocks with their memories; the caller closes the descriptors opened for them.

    ``backends`` are by id. Unreadable memory is not an error: ``why_not`` is set instead.
    """
    mappings: list[Mapping] = []
    why_not = why_no_pid or "the process of this QEMU is unknown"
    if pid is not None:
        try:
            mappings, why_not = read_mappings(pid), ""
        except OSError as error:
            why_not = (
                f"/proc/{pid}/maps cannot be read ({error.strerror}): run as the user of QEMU, or "
                "as root (CAP_SYS_PTRACE)"
            )
    blocks: list[GuestBlock] = []
    try:
        for line in lines:
            backend = _backend_of(line, backends)
            blocks.append(_block(line, backend, pid or 0, mappings, why_not))
    except BaseException:
        for block in blocks:
            if isinstance(block.memory, FileMemory):
                os.close(block.memory.fd)
        raise
    return blocks


def _backend_of(line: RamLine, backends: Table[str, Backend]) -> Backend | None:
    """Return the backend that a block is named after: ID, /objects/ID, or PATH-OF-DEVICE/ID."""
    backend = backends.get(line.name.rpartition("/")[2])
    return backend if backend is not None and backend.size == line.length else None


def _block(
    line: RamLine, backend: Backend | None, pid: int, mappings: Sequence[Mapping], why_not: str
) -> GuestBlock:
    place = covering(mappings, line.host_address, line.length)
    shared = all(m.shared for m in place) if place else backend is not None and backend.share
    memory: Memory | None = None
    if not why_not and not place:
        why_not = f"its address {line.host_address:#x} is not mapped in process {pid}"
    if not why_not:
        memory, why_not = _memory(line, place, pid, shared)
    kind = "" if backend is None else backend.type
    return GuestBlock(
        line.name,
        line.length,
        line.page_size,
        line.host_address,
        memory,
        shared,
        shared and kind == "memory-backend-file",
        kind,
        why_not,
    )


def _memory(
    line: RamLine, place: Sequence[Mapping], pid: int, shared: bool
) -> tuple[Memory | None, str]:
    why_no_file = ""
    if shared:
        try:
            return _file_memory(line, place, pid), ""
        except OSError as error:
            why_no_file = f"its file cannot be read ({error.strerror}); "
    if not place[0].readable:
        return None, why_no_file + "QEMU itself has no read access to it"
    private = ProcessMemory(pid, line.host_address, line.length)
    refusal = private.refusal()
    if refusal is None:
        return private, ""
    return None, why_no_file + _why_not_process(refusal, pid)


def _file_memory(line: RamLine, place: Sequence[Mapping], pid: int) -> FileMemory:
    """Return the part of a file that is mapped there; OSError unless it is one readable piece."""
    first = place[0]
    for m in place:
        one_piece = m.offset - first.offset == m.start - first.start
        if (m.device, m.inode) != (first.device, first.inode) or not one_piece:
            raise OSError(errno.EINVAL, "it is in several pieces of files")
    offset = first.offset + line.host_address - first.start
    fd = open_mapped(pid, first)
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.EINVAL, "it is neither a file nor a memfd")
        if os.lseek(fd, 0, os.SEEK_END) < offset + line.length:
            raise OSError(errno.EINVAL, "it is shorter than the block")
    except BaseException:
        os.close(fd)
        raise
    return FileMemory(fd, offset, line.length)


def _why_not_process(error: OSError, pid: int) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return (
            f"private memory of process {pid} may not be read: run as root (CAP_SYS_PTRACE), or "
            "as the user of QEMU with kernel.yama.ptrace_scope = 0"
        )
    if error.errno == errno.ENOSYS:
        return "this system does not permit process_vm_readv"
    return f"memory of process {pid} cannot be read: {error.strerror}"
