"""The names of :mod:`pyqmigrate.vm`, for programs without asyncio.

    from pyqmigrate.vm import sync as vm

    report = vm.connect("/run/guest.qmp").save("/snap/guest.mapped")
    guest = vm.restore("/snap/guest.mapped", ["qemu-system-x86_64", "-m", "4G"])
    guest.process.wait()

Every call runs an event loop of its own to its end, and raises UsageError inside a running one.
Arguments, results and errors are those of :mod:`pyqmigrate.vm`. Ctrl-C cancels the call, and the
guest is left as it was found. :class:`pyqmigrate.vm.Pool` has no form here: it starts guests between its
calls, for which it needs an event loop. ``pyqmigrate vm pool`` serves programs without one.
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
from pyqmigrate.vm.incoming.keywords import VmCloneOptions, VmRestoreOptions
from pyqmigrate.vm.incoming.recording import WorkingSetReport
from pyqmigrate.vm.incoming.report import RestoreReport
from pyqmigrate.vm.outgoing.options import VmCheckOptions, VmSaveOptions
from pyqmigrate.vm.outgoing.report import VmSaveReport
from pyqmigrate.vm.plan.check import CheckReport

__all__ = ["connect", "Vm", "restore", "RestoredVm", "clone", "Clone"]

T = TypeVar("T")


def connect(qmp: str | os.PathLike[str]) -> Vm:
    """Return a handle on the QEMU whose monitor listens on the UNIX socket ``qmp``."""
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
    """A restored guest; ``process`` is its QEMU, which has to be waited for as any child.

    Nothing is connected to its monitor: give ``restore`` a ``qmp`` to reach it later.
    ``recording`` is what the option ``record`` gave, or why it failed.
    """

    process: subprocess.Popen[bytes]
    report: RestoreReport
    recording: WorkingSetReport | PyqmigrateError | None = None


def restore(
    snapshot: Target, command: Sequence[str] | None = None, **options: Unpack[VmRestoreOptions]
) -> RestoredVm:
    """As :func:`pyqmigrate.vm.restore`; with ``record``, returns after that many seconds."""

    async def run() -> RestoredVm:
        guest = await vm.restore(snapshot, command, **options)
        recording = None
        try:
            recording = await _recorded(guest)
        finally:
            await _close([guest])
        return RestoredVm(guest.process, guest.report, recording)

    return _run("restore", run())


@dataclass(frozen=True)
class Clone:
    """Guest ``number`` (from 1 on), its monitor socket, and either ``vm`` or ``error``."""

    number: int
    qmp: Path
    vm: RestoredVm | None = None
    error: PyqmigrateError | None = None


def clone(
    snapshot: Target,
    command: Sequence[str] | None = None,
    count: int = 1,
    **options: Unpack[VmCloneOptions],
) -> list[Clone]:
    """As :func:`pyqmigrate.vm.clone`."""

    async def run() -> list[Clone]:
        clones = await vm.clone(snapshot, command, count, **options)
        await _close([clone.vm for clone in clones if clone.vm is not None])
        return [
            Clone(
                clone.number,
                clone.qmp,
                None if clone.vm is None else RestoredVm(clone.vm.process, clone.vm.report),
                clone.error,
            )
            for clone in clones
        ]

    return _run("clone", run())


async def _recorded(guest: vm.RestoredVm) -> WorkingSetReport | PyqmigrateError | None:
    """Wait for the recording of a guest; a cancellation ends the guest, which the caller does not get."""
    if guest.recording is None:
        return None
    try:
        return await asyncio.shield(guest.recording)
    except PyqmigrateError as error:
        return error
    except BaseException:
        await guest.end()
        raise


async def _close(guests: Sequence[vm.RestoredVm]) -> None:
    """Close the sessions; after an error end the guests, which the caller does not get."""
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
