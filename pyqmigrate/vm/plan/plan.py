"""How a save is going to be carried out, and the room that it takes.

Settings that are fast may write zero pages, too, and what is written takes room. So they are chosen
first, then comes what they need; where that does not fit and the data alone does, zero pages are
left out, however many writes that takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyqmigrate.snapshot.save.writer import Sparse
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.blockers import DeviceStateMethod
from pyqmigrate.vm.plan.engine import Engine, EngineChoice
from pyqmigrate.vm.plan.sampling import Contents, count_data, extent_bytes, sample
from pyqmigrate.vm.plan.settings import (
    WRITE_SECONDS,
    Changes,
    for_device_state,
    for_pages,
    no_changes,
    writes_all,
)

__all__ = ["Plan", "make_plan"]

_SPARE = 4 << 20  # headers, device state
_BITS_A_BITMAP_BYTE = 8


@dataclass(frozen=True)
class Plan:
    """What is decided about a save; sizes in bytes.

    ``sparse`` is what becomes of zero pages and may be stricter than what was asked for; then
    ``notes`` say why, in sentences. ``need`` is the disk that the file takes at most; ``data`` is
    what the guest's pages hold that are not zero, None where nothing depended on it and so they
    were not counted. ``free`` is None where the file system knows no limit. ``contents`` is what
    samples showed, where settings depend on it.
    """

    engine: Engine
    total: int
    sparse: Sparse
    changes: Changes
    need: int
    data: int | None
    free: int | None
    contents: Contents | None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether there is room; None where that is not known."""
        return None if self.free is None else self.need <= self.free

    def need_of(self, data: int) -> int:
        """The disk that the file takes at most, if ``data`` bytes are in pages that are not zero."""
        return _need(self.engine, self.sparse, self.contents, data, self.total)

    def seconds(self, data: int, rate: float) -> float:
        """How long it takes to write, at ``rate`` bytes a second."""
        apart = self.contents.pieces if self.contents and self.sparse is Sparse.EXACT else 0
        return self.need_of(data) / rate + apart * WRITE_SECONDS


def make_plan(
    guest: GuestInfo,
    choice: EngineChoice,
    *,
    channels: int,
    direct: bool,
    sparse: Sparse,
    live: bool,
    with_disks: bool,
    free: int | None,
) -> Plan:
    """Decide, with ``free`` bytes of room; pages are counted only where the room is in doubt.

    ``direct``: direct I/O is possible. The guest may run meanwhile. Blocks, when counting about a
    second per 10 GiB. Raises NotSupported for a QEMU that cannot do it, GuestMemoryError when
    memory went away.
    """
    contents = sample(guest) if choice.engine is Engine.QEMU else None
    unseen = sum(block.length for block in guest.blocks if block.memory is None)

    def plan(sparse: Sparse, data: int, *notes: str, counted: bool = True) -> Plan:
        return Plan(
            choice.engine,
            guest.total_ram,
            sparse,
            _changes(guest, choice, channels, direct, sparse, live, with_disks, contents),
            _need(choice.engine, sparse, contents, data, guest.total_ram),
            data if counted else None,
            free,
            contents,
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
        f"zero pages are left out one by one (sparse exact): {free >> 20} MiB are free, and what "
        f"is faster may take {first.need >> 20} MiB",
    )
    return second if second.fits else first


def _need(engine: Engine, sparse: Sparse, contents: Contents | None, data: int, total: int) -> int:
    if sparse is Sparse.DENSE or (engine is Engine.QEMU and writes_all(sparse, contents)):
        pages = total
    elif engine is Engine.DIRECT:
        pages = min(total, data + data * sparse.gap_share // 100)
    else:
        pages = data
    return pages + total // 4096 // _BITS_A_BITMAP_BYTE + _SPARE


def _changes(
    guest: GuestInfo,
    choice: EngineChoice,
    channels: int,
    direct: bool,
    sparse: Sparse,
    live: bool,
    with_disks: bool,
    contents: Contents | None,
) -> Changes:
    if choice.way is DeviceStateMethod.DEVICES_ONLY:
        return no_changes()
    pause = with_disks and guest.running
    if choice.way is DeviceStateMethod.IGNORE_SHARED:
        return for_device_state(guest, pause=pause)
    return for_pages(
        guest,
        channels=channels,
        direct=direct,
        sparse=sparse,
        pause=pause and live,
        contents=contents,
    )
