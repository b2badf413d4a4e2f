"""A running QEMU, by the path of its monitor."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyqmigrate.format.digest import Algorithm
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.qapi.monitor_address import monitor_path
from pyqmigrate.snapshot.save.writer import Sparse
from pyqmigrate.vm.outgoing.save import Then, VmSaveReport, save
from pyqmigrate.vm.plan.check import CheckReport, check
from pyqmigrate.vm.qemu.monitor import Monitor

if TYPE_CHECKING:
    from pyqmigrate.vm.outgoing.migrate import ProgressCallback

__all__ = ["Vm", "connect"]


def connect(qmp: str | os.PathLike[str]) -> Vm:
    """A handle on the QEMU whose monitor listens on the UNIX socket ``qmp``: PATH or unix:PATH.

    Raises UsageError for another kind of address.
    """
    return Vm(qmp)


class Vm:
    """A running QEMU. Each method opens a session of its own and ends it: a monitor serves one
    client at a time, and others want it too."""

    def __init__(self, qmp: str | os.PathLike[str]) -> None:
        self.qmp = monitor_path(qmp)

    def __repr__(self) -> str:
        return f"Vm({str(self.qmp)!r})"

    async def save(
        self,
        snapshot: str | os.PathLike[str],
        *,
        engine: str = "auto",
        live: bool = False,
        then: Then | str | None = None,
        channels: int = 2,
        direct_io: DirectIO | str = DirectIO.AUTO,
        sparse: Sparse | str = Sparse.AUTO,
        with_disks: bool = False,
        seal: Algorithm | str | None = None,
        describe: bool = True,
        set_time: bool = False,
        guest_agent: str | os.PathLike[str] | None = None,
        progress: ProgressCallback | None = None,
    ) -> VmSaveReport:
        """Save the guest; see :func:`pyqmigrate.vm.outgoing.save.save`."""
        return await save(
            self.qmp,
            snapshot,
            engine=engine,
            live=live,
            then=then,
            channels=channels,
            direct_io=direct_io,
            sparse=sparse,
            with_disks=with_disks,
            seal=seal,
            describe=describe,
            set_time=set_time,
            guest_agent=guest_agent,
            progress=progress,
        )

    async def check(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        engine: str = "auto",
        live: bool = False,
        sparse: Sparse | str = Sparse.AUTO,
    ) -> CheckReport:
        """Say what a save into ``directory`` would do; see
        :func:`pyqmigrate.vm.plan.check.check`."""
        async with await Monitor.connect(self.qmp) as monitor:
            return await check(monitor, directory, engine=engine, live=live, sparse=sparse)
