"""The names of :mod:`pyqmigrate.vm`, for programs without asyncio.

    from pyqmigrate.vm import sync as vm

    report = vm.connect("/run/guest.qmp").save("/snap/guest.mapped")
    guest = vm.restore("/snap/guest.mapped", ["qemu-system-x86_64", "-m", "4G"])
    guest.process.wait()

Every call runs an event loop of its own to its end, so none may be made where one runs already.
Arguments, results and errors are those of the names in :mod:`pyqmigrate.vm`. Ctrl-C cancels what
is under way, and the guest is put back as it was found.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyqmigrate import vm
from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.io.target import Target
from pyqmigrate.vm.check import CheckReport
from pyqmigrate.vm.restoring import RestoreReport
from pyqmigrate.vm.save import VmSaveReport

__all__ = ["connect", "Vm", "restore", "RestoredVm", "clone", "Clone"]


def connect(qmp: str | os.PathLike[str]) -> Vm:
    """A handle on the QEMU whose monitor listens on the UNIX socket ``qmp``."""
    return Vm(qmp)


class Vm:
    """As :class:`pyqmigrate.vm.Vm`, with methods that block."""

    def __init__(self, qmp: str | os.PathLike[str]) -> None:
        self._vm = vm.Vm(qmp)

    def __repr__(self) -> str:
        return repr(self._vm)

    def save(self, snapshot: str | os.PathLike[str], **options: Any) -> VmSaveReport:
        """As :meth:`pyqmigrate.vm.Vm.save`."""
        return asyncio.run(self._vm.save(snapshot, **options))

    def check(
        self, directory: str | os.PathLike[str] | None = None, **options: Any
    ) -> CheckReport:
        """As :meth:`pyqmigrate.vm.Vm.check`."""
        return asyncio.run(self._vm.check(directory, **options))


@dataclass(frozen=True)
class RestoredVm:
    """A guest that goes on; ``process`` is its QEMU, which has to be waited for as any child.

    Nothing is connected to its monitor: give a restore ``qmp`` to reach it later.
    """

    process: subprocess.Popen[bytes]
    report: RestoreReport


def restore(
    snapshot: Target, command: Sequence[str] | None = None, **options: Any
) -> RestoredVm:
    """As :func:`pyqmigrate.vm.restoring.restore`."""

    async def restored() -> RestoredVm:
        async with await vm.restore(snapshot, command, **options) as guest:
            return RestoredVm(guest.process, guest.report)

    return asyncio.run(restored())


@dataclass(frozen=True)
class Clone:
    """Guest ``number`` (from 1 on), its monitor socket, and either ``vm`` or ``error``."""

    number: int
    qmp: Path
    vm: RestoredVm | None = None
    error: PyqmigrateError | None = None


def clone(
    snapshot: Target, command: Sequence[str] | None = None, count: int = 1, **options: Any
) -> list[Clone]:
    """As :func:`pyqmigrate.vm.clone`."""

    async def cloned() -> list[Clone]:
        guests = []
        for one in await vm.clone(snapshot, command, count, **options):
            held = None
            if one.vm is not None:
                await one.vm.close()
                held = RestoredVm(one.vm.process, one.vm.report)
            guests.append(Clone(one.number, one.qmp, held, one.error))
        return guests

    return asyncio.run(cloned())
