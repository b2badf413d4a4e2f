"""The arguments of a live method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyqmigrate.io.output import OutputFile
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.outgoing.migrate import WhilePaused
from pyqmigrate.vm.outgoing.options import SaveOptions
from pyqmigrate.vm.outgoing.transaction import SaveTransaction
from pyqmigrate.vm.plan.engine import EngineChoice
from pyqmigrate.vm.plan.live import LiveChoice
from pyqmigrate.vm.plan.live_option import LiveRequest
from pyqmigrate.vm.plan.plan import Plan

__all__ = ["LiveSave"]


@dataclass(frozen=True, kw_only=True)
class LiveSave:
    """One live save, by one method: ``live.method``.

    ``transaction`` applies ``plan.changes`` and rolls everything back. ``engine.way`` is how a
    method of engine ``direct`` gets the device state. ``resume``: the guest runs afterwards.
    ``while_paused`` takes the disks: call it at the instant that the file holds, while the guest is
    stopped. ``see_disks`` notes the state of the disks for the record; it is called when the guest is
    resumed, and blocks. ``request.max_pause`` is the promised pause in seconds, or None; a method
    that cannot keep it raises :class:`~pyqmigrate.errors.LiveSaveAbandoned`. ``request.base`` is
    None, "auto" or an absolute path.
    """

    transaction: SaveTransaction
    guest: GuestInfo
    output: OutputFile
    plan: Plan
    engine: EngineChoice
    request: LiveRequest
    live: LiveChoice
    options: SaveOptions
    resume: bool
    while_paused: WhilePaused | None
    see_disks: Callable[[], None]
