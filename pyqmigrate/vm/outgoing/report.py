"""What a save did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyqmigrate.format.digest import Algorithm
from pyqmigrate.vm.outgoing.timeline import Phase
from pyqmigrate.vm.plan.engine import Engine
from pyqmigrate.vm.plan.live_option import Instant, LiveMethod
from pyqmigrate.vm.plan.settings import UsedSetting

__all__ = ["VmSaveReport"]


@dataclass(frozen=True)
class VmSaveReport:
    """What a save did. Sizes in bytes, times in seconds.

    ``downtime`` is from QEMU's event STOP to RESUME; None if the guest did not run before or does
    not run again. ``seconds`` is wall time until the snapshot had its name. ``bytes_written`` went
    to the file, ``bytes_allocated`` is its size on disk, ``rate`` is ``bytes_written`` a second.
    ``run_state_after`` is None after ``quit``. ``disks`` are sentences on what a restore needs of
    the writable disks, ``record`` is the file that describes the VM
    (:mod:`pyqmigrate.vm.record.contents`), None if it could not be published. ``seal`` is the
    algorithm of the seal, if any. ``notes`` are sentences.

    ``method`` is that of a live save, None if the guest was stopped for all of it; ``method_why``
    is a sentence. ``instant`` is the instant of the save whose state the file holds. ``rounds`` is
    the number of passes over memory, ``slowdown`` the share, from 0 to 1, of the processor time of its
    virtual CPUs that the guest lost during the save (:mod:`pyqmigrate.vm.guest.processor_time`);
    None if not known. ``base`` is the snapshot that an increment belongs to, and
    ``changed_pages`` the number of pages that differ from it; None for a whole snapshot.

    ``timeline`` is what happened when, by its start: each :class:`~pyqmigrate.vm.Phase` in a lane.
    """

    snapshot: str
    engine: Engine
    why: str
    settings: Mapping[str, UsedSetting]
    direct_io: bool
    direct_io_reason: str
    channels: int
    downtime: float | None
    seconds: float
    bytes_written: int
    bytes_allocated: int
    file_size: int
    rate: float
    run_state_before: str
    run_state_after: str | None
    disks: tuple[str, ...]
    record: str | None
    seal: Algorithm | None = None
    notes: tuple[str, ...] = ()
    method: LiveMethod | None = None
    method_why: str = ""
    instant: Instant = Instant.START
    rounds: int | None = None
    slowdown: float | None = None
    base: str | None = None
    changed_pages: int | None = None
    timeline: tuple[Phase, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-compatible values; ``disks`` are ``disk_needs``."""
        data = asdict(self)
        data["disk_needs"] = data.pop("disks")
        return data
