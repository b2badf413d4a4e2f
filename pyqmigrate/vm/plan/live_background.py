"""Whether a guest can be saved by ``background``, and how long that pauses it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pyqmigrate.errors import NotSupported, QemuError
from pyqmigrate.vm.guest.inspect import GuestBlock, GuestInfo
from pyqmigrate.vm.guest.process import covering, read_mappings
from pyqmigrate.vm.plan.engine import Engine, choose_engine
from pyqmigrate.vm.plan.live_option import LiveMethod, LiveOption, LiveRequest

__all__ = ["background_option"]

# Seconds, from experiments: to write-protect pages at the start and to end that, whichever is longer, for
# each GiB. docs/vm.md repeats them (tests/unit/docs/test_live_figures.py).
_LEAST = 0.01
_SHARED = 0.034
_PRIVATE = 0.022  # mostly at the end: huge pages are protected at once, and are split by then
_HUGE = 0.005
_HUGE_PAGE = 1 << 20
_PROTECTABLE = {"tmpfs", "hugetlbfs", "devtmpfs"}


def background_option(guest: GuestInfo, request: LiveRequest) -> LiveOption:
    """Return what is known of ``background`` for ``guest``.

    QEMU alone knows whether it has the privilege for it: a save finds that out.
    """
    reasons = []
    if request.base is not None or request.keep_digests:
        reasons.append("QEMU writes the file: it knows no base and keeps no digests")
    if not guest.running:
        reasons.append("the guest does not run")
    if "background-snapshot" not in guest.capabilities:
        reasons.append("this QEMU has no background-snapshot")
    try:
        choose_engine(guest, engine=Engine.QEMU)
    except (NotSupported, QemuError) as error:
        reasons.append(str(error))
    for block, file_system in _on_disks(guest):
        reasons.append(
            f"the memory of {block.name!r} is a file on {file_system}, which Linux cannot "
            "write-protect for QEMU (userfaultfd)"
        )
    pause = _LEAST + sum(block.length / (1 << 30) * _rate(block) for block in guest.blocks)
    return LiveOption(
        LiveMethod.BACKGROUND,
        tuple(reasons),
        pause,
        "QEMU write-protects all memory while the guest is stopped, and ends that while it waits",
    )


def _rate(block: GuestBlock) -> float:
    if block.page_size >= _HUGE_PAGE:
        return _HUGE
    return _SHARED if block.shared else _PRIVATE


def _on_disks(guest: GuestInfo) -> Iterator[tuple[GuestBlock, str]]:
    """Yield blocks whose memory is known to be a file on a disk, and the kind of its file system."""
    if guest.pid is None:
        return
    try:
        mappings = read_mappings(guest.pid)
        kinds = _file_systems(guest.pid)
    except OSError:
        return
    for block in guest.blocks:
        for mapping in covering(mappings, block.host_address, block.length):
            kind = kinds.get(mapping.device)
            if mapping.inode and kind is not None and kind not in _PROTECTABLE:
                yield block, kind
                break


def _file_systems(pid: int) -> dict[int, str]:
    """Return the kinds of the mounted file systems that a process sees, by device number."""
    kinds = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        major, minor = before.split()[2].split(":")
        kinds[os.makedev(int(major), int(minor))] = after.split()[0]
    return kinds
