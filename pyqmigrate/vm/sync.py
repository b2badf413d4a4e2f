"""The names of :mod:`pyqmigrate.vm`, for programs without asyncio.

    from pyqmigrate.vm import sync as vm

    report = vm.connect("/run/guest.qmp").save("/snap/guest.mapped")
    guest = vm.restore("/snap/guest.mapped", ["qemu-system-x86_64", "-m", "4G"])
    guest.process.wait()

Every call runs an event loop of its own to its end. Where one runs already, it raises UsageError.
Arguments, results and errors are those of the names in :mod:`pyqmigrate.vm`. Ctrl-C cancels what
is under way, and the guest is put back as it was found.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Unpack

from pyqmigrate import vm
from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.io.target import Target
from pyqmigrate.vm.incoming.restore import RestoreReport
from pyqmigrate.vm.outgoing.options import VmCheckOptions, VmSaveOptions
from pyqmigrate.vm.outgoing.report import VmSaveReport
from pyqmigrate.vm.plan.check import CheckReport

__all__ = ["connect", "Vm", "restore", "RestoredVm", "clone", "Clone"]

T = TypeVar("T")


def connect(qmp: str | os.PathLike[str]) -> Vm:
    """A handle on the QEMU whose monitor listens on the UNIX socket ``qmp``."""
    return Vm(qmp)


class Vm:
    """As :class:`pyqmigrate.vm.Vm`, with methods that block."""

    def __init__(self, qmp: str | os.PathLike[str]) -> None:
        self._vm = vm.Vm(qmp)

    def __repr__(self) -> str:
        return repr(self._vm)

    def save(
        self, snapshot: str | os.PathLike[str], **options: Unpack[VmSaveOptions]
    ) -> VmSaveReport:
        """As :meth:`pyqmigrate.vm.Vm.save`."""
        return _run("Vm.save", self._vm.save(snapshot, **options))

    def check(
        self, directory: str | os.PathLike[str] | None = None, **options: Unpack[VmCheckOptions]
    ) -> CheckReport:
        """As :meth:`pyqmigrate.vm.Vm.check`."""
        return _run("Vm.check", self._vm.check(directory, **options))


@dataclass(frozen=True)
class RestoredVm:
    """A guest that goes on; ``process`` is its QEMU, which has to be waited for as any child.

    Nothing is connected to its monitor: give a restore ``qmp`` to reach it later.
    """

    process: subprocess.Popen[bytes]
    report: RestoreReport


def restore(snapshot: Target, command: Sequence[str] | None = None, **options: Any) -> RestoredVm:
    """As :func:`pyqmigrate.vm.incoming.restore.restore`."""

    async def restored() -> RestoredVm:
        guest = await vm.restore(snapshot, command, **options)
        await _hang_up([guest])
        return RestoredVm(guest.process, guest.report)

    return _run("restore", restored())


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
        clones = await vm.clone(snapshot, command, count, **options)
        await _hang_up([one.vm for one in clones if one.vm is not None])
        return [
            Clone(
                one.number,
                one.qmp,
                None if one.vm is None else RestoredVm(one.vm.process, one.vm.report),
                one.error,
            )
            for one in clones
        ]

    return _run("clone", cloned())


async def _hang_up(guests: Sequence[vm.RestoredVm]) -> None:
    """Close the sessions; a guest that the caller will not hear of is ended."""
    try:
        for guest in guests:
            await guest.close()
    except BaseException:
        for guest in guests:
            await guest.end()
        raise


def _run(name: str, work: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    work.close()
    raise UsageError(
        f"vm.sync.{name} blocks, and an event loop runs in this thread: use await "
        f"pyqmigrate.vm.{name}(...) here, or asyncio.to_thread(vm.sync.{name}, ...)"
    )
