"""A running QEMU, by the path of its monitor."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Unpack

from pyqmigrate.qapi.monitor_address import monitor_path
from pyqmigrate.vm.outgoing.options import VmCheckOptions, VmSaveOptions
from pyqmigrate.vm.outgoing.report import VmSaveReport
from pyqmigrate.vm.outgoing.save import save
from pyqmigrate.vm.qemu.monitor import Monitor

if TYPE_CHECKING:
    from pyqmigrate.vm.plan.check import CheckReport

__all__ = ["Vm", "connect"]


def connect(qmp: str | os.PathLike[str]) -> Vm:
    """Return a handle on the QEMU whose monitor listens on the UNIX socket ``qmp``: PATH or
    unix:PATH.

    Raises UsageError for another kind of address.
    """
    return Vm(qmp)


class Vm:
    """A running QEMU. Each method opens and ends a monitor session of its own: a monitor serves one
    client at a time."""

    def __init__(self, qmp: str | os.PathLike[str]) -> None:
        self.qmp = monitor_path(qmp)

    def __repr__(self) -> str:
        return f"Vm({str(self.qmp)!r})"

    async def save(
        self, snapshot: str | os.PathLike[str], **options: Unpack[VmSaveOptions]
    ) -> VmSaveReport:
        """Save the guest into the file ``snapshot``; see :class:`VmSaveOptions`, and
        :func:`pyqmigrate.vm.outgoing.save.save` for the errors."""
        return await save(self.qmp, snapshot, **options)

    async def check(
        self, directory: str | os.PathLike[str] | None = None, **options: Unpack[VmCheckOptions]
    ) -> CheckReport:
        """Report what a save into ``directory`` would do; see
        :func:`pyqmigrate.vm.plan.check.check`."""
        from pyqmigrate.vm.plan.check import check

        async with await Monitor.connect(self.qmp) as monitor:
            return await check(monitor, directory, **options)
