"""Plan a save: its settings, and the disk space that it needs.

The fastest settings may write zero pages, too, which takes space. They are chosen first; if the
file would then not fit but the data alone would, zero pages are left out, however many writes that
takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyqmigrate.snapshot.save.writer import Sparse
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.blockers import DeviceStateMethod
from pyqmigrate.vm.plan.engine import Engine, EngineChoice
from pyqmigrate.vm.plan.live_converge import DEFAULT_PAUSE, downtime_limit
from pyqmigrate.vm.plan.live_option import LiveMethod, disks_pause
from pyqmigrate.vm.plan.sampling import Sample, count_data, extent_bytes, sample_memory
from pyqmigrate.vm.plan.settings import (
    WRITE_SECONDS,
    Changes,
    for_background,
    for_device_state,
    for_pages,
    no_changes,
    writes_all,
)

__all__ = ["Plan", "make_plan"]

_SPARE = 4 << 20  # headers, device state
_BITS_PER_BYTE = 8  # of a bitmap
_LEAST_PAGE_BITS = 12  # where the target page size is unknown: the largest bitmap


@dataclass(frozen=True)
class Plan:
    """The decisions about a save; sizes in bytes.

    ``sparse`` may be stricter than requested; then ``notes`` say why, in sentences. ``need`` is
    the most disk space that the file takes. ``data`` is the size of the pages that are not zero,
    None if nothing depended on it and they were not counted. ``free`` is None if the file system
    has no limit. ``sample`` is an estimate of the memory, if settings depend on it. ``page_size``
    is the target page size.
    """

    engine: Engine
    total: int
    sparse: Sparse
    changes: Changes
    need: int
    data: int | None
    free: int | None
    sample: Sample | None
    page_size: int
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether there is enough space; None if unknown."""
        return None if self.free is None else self.need <= self.free

    def need_of(self, data: int) -> int:
        """Return the most disk space that the file takes for ``data`` bytes of nonzero pages."""
        return _need(self.engine, self.sparse, self.sample, data, self.total, self.page_size)

    def seconds(self, data: int, rate: float) -> float:
        """Return how long writing takes at ``rate`` bytes a second."""
        writes = self.sample.pieces if self.sample and self.sparse is Sparse.EXACT else 0
        return self.need_of(data) / rate + writes * WRITE_SECONDS


def make_plan(
    guest: GuestInfo,
    choice: EngineChoice,
    *,
    channels: int,
    direct: bool,
    sparse: Sparse,
    live: LiveMethod | None = None,
    max_pause: float | None = None,
    with_disks: bool,
    free: int | None,
) -> Plan:
    """Plan a save into ``free`` bytes; pages are counted only if the space may not suffice.

    ``direct``: direct I/O is possible. ``live`` is the method of a live save, ``max_pause`` its
    promised pause in seconds. The guest may keep running. Blocks; counting takes about a
    second per 10 GiB. Raises NotSupported for a QEMU that cannot save like this, GuestMemoryError
    if the memory can no longer be read.
    """
    by_channels = choice.engine is Engine.QEMU and live is not LiveMethod.BACKGROUND
    sample = sample_memory(guest) if by_channels else None
    page_size = 1 << (guest.target_page_bits or _LEAST_PAGE_BITS)
    unseen = sum(block.length for block in guest.blocks if block.memory is None)

    def plan(sparse: Sparse, data: int, *notes: str, counted: bool = True) -> Plan:
        return Plan(
            choice.engine,
            guest.total_ram,
            sparse,
            _changes(guest, choice, channels, direct, sparse, live, max_pause, with_disks, sample),
            _need(choice.engine, sparse, sample, data, guest.total_ram, page_size),
            data if counted else None,
            free,
            sample,
            page_size,
            notes,
        )

    first = plan(sparse, unseen + extent_bytes(guest), counted=False)
    if first.fits is not False or sparse is Sparse.DENSE:
        return first
    data = unseen + count_data(guest, channels)
    first = plan(sparse, data)
    if first.fits is not False or sparse is Sparse.EXACT:
        return first
    assert free is not None
    second = plan(
        Sparse.EXACT,
        data,
        f"every zero page is left out (sparse exact): {free >> 20} MiB are free, and the faster "
        f"way may take {first.need >> 20} MiB",
    )
    return second if second.fits else first


def _need(
    engine: Engine, sparse: Sparse, sample: Sample | None, data: int, total: int, page_size: int
) -> int:
    if sparse is Sparse.DENSE or (engine is Engine.QEMU and writes_all(sparse, sample)):
        pages = total
    elif engine is Engine.DIRECT:
        pages = min(total, data + data * sparse.gap_share // 100)
    else:
        pages = data
    return pages + total // page_size // _BITS_PER_BYTE + _SPARE


def _changes(
    guest: GuestInfo,
    choice: EngineChoice,
    channels: int,
    direct: bool,
    sparse: Sparse,
    live: LiveMethod | None,
    max_pause: float | None,
    with_disks: bool,
    sample: Sample | None,
) -> Changes:
    if choice.way is DeviceStateMethod.DEVICES_ONLY:
        return no_changes()
    pause = with_disks and guest.running
    if choice.way is DeviceStateMethod.IGNORE_SHARED:
        return for_device_state(guest, pause=pause)
    if live is LiveMethod.BACKGROUND:
        return for_background(guest, sparse=sparse)
    rest = DEFAULT_PAUSE if max_pause is None else max_pause - disks_pause(guest, with_disks)
    return for_pages(
        guest,
        channels=channels,
        direct=direct,
        sparse=sparse,
        pause=pause and live is not None,
        sample=sample,
        downtime_limit=None if live is None else downtime_limit(rest),
    )
