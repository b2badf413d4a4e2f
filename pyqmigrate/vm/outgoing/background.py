"""The live method ``background``: QEMU writes the guest's memory as it was at the start.

QEMU write-protects all memory while the guest is stopped, resumes it, and writes each page before
the guest changes it (capability ``background-snapshot``). With ``mapped-ram`` it puts pages into
their places in the file; what it leaves out is completed here
(:mod:`pyqmigrate.snapshot.save.background`).

Without disk snapshots QEMU itself stops and resumes the guest. Disk snapshots belong to the same
instant: the guest is stopped first, and resumed once the first page has been written, which QEMU does
after its memory is write-protected and its device state is kept. Before it protects memory QEMU
touches every page; so as not to wait for that with a stopped guest, pages are touched here first.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

from pyqmigrate.errors import LiveSaveAbandoned, NotSupported, QemuRefused
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.memory import FileMemory
from pyqmigrate.snapshot.save.background import complete_background_snapshot
from pyqmigrate.vm.cancellation import check_cancelled, shielded
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.guest.run_state import set_run_state
from pyqmigrate.vm.outgoing.fdset import open_for_qemu
from pyqmigrate.vm.outgoing.live_save import LiveSave
from pyqmigrate.vm.outgoing.migrate import ENDED, Written, finish_migration
from pyqmigrate.vm.outgoing.timeline import Lane
from pyqmigrate.vm.outgoing.transaction import SaveTransaction

__all__ = ["save_background"]

_POLL = 0.001  # seconds
_PIECE = 1 << 20  # bytes
_HUGE_PAGE = 2 << 20  # bytes
_UNTOUCHED = (
    "the memory of QEMU could not be touched beforehand (it cannot be read from here), which may "
    "have made the pause longer"
)


async def save_background(save: LiveSave) -> Written:
    """Have QEMU write into ``save.output`` the state of the guest at the start.

    Raises NotSupported if QEMU refuses background snapshots of this guest or if it is not to run
    afterwards, LiveSaveAbandoned if taking the disks takes longer than the promised pause, QemuError
    (QemuGone, NoSpace) if the migration fails, Cancelled, TargetError.
    """
    if not (save.guest.running and save.resume):
        raise NotSupported(
            "a background snapshot holds the state at its start: it is for a guest that runs before "
            "and after"
        )
    if save.options.direct_io is DirectIO.ON:
        raise NotSupported("QEMU writes a background snapshot through the page cache only")
    transaction = save.transaction
    notes: list[str] = []
    allocated = _allocated(save.guest)
    with open_for_qemu(save.output) as fds:
        async with transaction.add_fds({"buffered": fds["buffered"]}) as path:
            await _apply(save)
            started_at = time.monotonic()
            if save.while_paused is None:
                await asyncio.to_thread(save.see_disks)
                transaction.events.mark_stopped()
                await transaction.migrate(path, background=True)
            else:
                if not await _touch_memory(save.guest):
                    notes.append(_UNTOUCHED)
                started_at = time.monotonic()
                await _start_with_disks(save, path)
            with transaction.timeline.phase(Lane.QEMU, "write pages and device state"):
                info = await finish_migration(transaction, progress=save.options.progress)
            await transaction.went_on()
    downtime = transaction.events.downtime(time.monotonic() - started_at)
    if downtime is None:
        downtime = info["downtime"] / 1000
    if save.request.max_pause is not None and downtime > save.request.max_pause:
        notes.append(
            f"the guest was paused for {downtime * 1e3:.0f} ms at the start, longer than expected"
        )
    with transaction.timeline.phase(Lane.FILE, "complete"):
        pages = await shielded(asyncio.to_thread(complete_background_snapshot, save.output))
    run_state = save.guest.run_state
    if save.while_paused is not None and not await shielded(
        asyncio.to_thread(set_run_state, save.output, run_state)
    ):
        notes.append(f"the snapshot records that the guest was paused, but it was {run_state}")
    notes += _side_effects(save.guest, allocated)
    written = max(info["ram"]["transferred"], pages << (save.guest.target_page_bits or 12))
    return Written(written, downtime, tuple(notes), rounds=1)


async def _apply(save: LiveSave) -> None:
    """Change the settings; QEMU checks here whether this guest's memory can be protected."""
    try:
        await save.transaction.apply(save.plan.changes)
    except QemuRefused as error:
        if "ackground-snapshot" not in error.desc:
            raise
        raise NotSupported(_explain(error.desc)) from error


def _explain(reason: str) -> str:
    if "memory configuration" in reason:
        why = (
            "Linux can write-protect anonymous, memfd, tmpfs and hugetlbfs memory this way, not "
            "memory that is a file on a disk, as that of an instantly restored guest"
        )
    elif "host kernel" in reason:
        why = (
            "QEMU needs userfaultfd: run it with CAP_SYS_PTRACE, let its user open "
            "/dev/userfaultfd, or set the sysctl vm.unprivileged_userfaultfd to 1"
        )
    else:
        return f"QEMU refuses a background snapshot: {reason}"
    return f"QEMU refuses a background snapshot ({reason}): {why}"


async def _start_with_disks(save: LiveSave, path: str) -> None:
    """Stop the guest, start the migration, take the disks, and resume the guest as soon as its
    memory is protected."""
    transaction, limit = save.transaction, save.request.max_pause
    assert save.while_paused is not None
    stopped_at = time.monotonic()
    await transaction.stop()
    try:
        transaction.events.mark_stopped()
        # QEMU touches and protects the memory in the meantime.
        await transaction.migrate(path, background=True)
        await save.while_paused()
        while not await _writes_pages(transaction):
            check_cancelled()
            if limit is not None and time.monotonic() - stopped_at > limit:
                raise LiveSaveAbandoned(
                    "the disk snapshots and protecting the memory took longer than "
                    f"{limit * 1e3:.0f} ms"
                )
            await transaction.events.migration(_POLL)
        await transaction.check_still_stopped()
    except BaseException:
        # The rollback waits until QEMU can cancel the migration; the guest does not wait for that.
        await shielded(transaction.resume())
        raise
    await transaction.resume()


async def _writes_pages(transaction: SaveTransaction) -> bool:
    """Return whether QEMU has written a page, or ended."""
    info: dict[str, Any] = await transaction.monitor.execute("query-migrate")
    ram = info.get("ram", {})
    return info["status"] in ENDED or ram.get("normal", 0) + ram.get("duplicate", 0) > 0


async def _touch_memory(guest: GuestInfo) -> bool:
    """Read all memory of QEMU's blocks, which maps their pages; return whether that succeeded."""
    if guest.pid is None or any(block.memory is None for block in guest.blocks):
        return False
    stop = threading.Event()
    try:
        return await asyncio.to_thread(_read_memory, guest, stop)
    finally:
        stop.set()


def _read_memory(guest: GuestInfo, stop: threading.Event) -> bool:
    buffer = bytearray(_PIECE)
    try:
        with Path(f"/proc/{guest.pid}/mem").open("rb", buffering=0) as memory:
            for block in guest.blocks:
                for offset in range(0, block.length, _PIECE):
                    if stop.is_set():
                        return False
                    memory.seek(block.host_address + offset)
                    size = min(_PIECE, block.length - offset)
                    if memory.readinto(memoryview(buffer)[:size]) != size:
                        raise OSError(errno.EIO, "short read")
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _allocated(guest: GuestInfo) -> int:
    """Return the bytes of memory that the files behind shared blocks hold, as far as is known."""
    return sum(
        os.fstat(block.memory.fd).st_blocks * 512
        for block in guest.blocks
        if isinstance(block.memory, FileMemory)
    )


def _side_effects(guest: GuestInfo, allocated_before: int) -> list[str]:
    """Return what the background snapshot did to the guest's memory for good."""
    notes = []
    grown = _allocated(guest) - allocated_before
    if grown >= _PIECE:
        notes.append(
            f"{grown >> 20} MiB of memory that the guest had not used before are allocated now: "
            "QEMU touches all shared memory for a background snapshot"
        )
    if _huge_pages_enabled() and any(
        not block.shared and block.length >= _HUGE_PAGE > block.page_size for block in guest.blocks
    ):
        notes.append(
            "transparent huge pages of the guest's memory were split into small pages; the kernel "
            "joins them again in time"
        )
    return notes


def _huge_pages_enabled() -> bool:
    try:
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
