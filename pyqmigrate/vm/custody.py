"""A guest in our hands: found in some state, and put back into it whatever happens.

    async with Custody(monitor, guest, changes, target) as custody:
        await custody.apply()
        ...
        await custody.end(resume=True)

Leaving it without having called :meth:`Custody.end` puts everything back: a migration under way
is cancelled, settings are what they were, the descriptors that QEMU was given are removed, the
guest runs if it ran, and its disks are the files that they were. The same is done by a guardian
process if this one is killed (:mod:`pyqmigrate.vm.guardian`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Generator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pyqmigrate.errors import QemuError, QemuGone, QemuRefused
from pyqmigrate.io.target import OutputTarget
from pyqmigrate.vm import guardian
from pyqmigrate.vm.connection import Monitor
from pyqmigrate.vm.disks import DiskPlan
from pyqmigrate.vm.guest import Guest
from pyqmigrate.vm.settings import Changes
from pyqmigrate.vm.unbroken import unbroken

__all__ = ["Custody", "drive"]

T = TypeVar("T")

_PATIENCE = 120.0  # seconds for QEMU to end what it was told to cancel


class Custody:
    """``changes`` are made by :meth:`apply`; ``target`` is the file that is being written, and
    ``plan`` has the snapshots of disks that are taken along.

    ``trouble`` is what could not be put back, in QEMU's words. Once the snapshot has its name, set
    ``published``: its disks are not touched any more.
    """

    def __init__(
        self, monitor: Monitor, guest: Guest, changes: Changes, target: OutputTarget,
        plan: DiskPlan | None = None,
    ) -> None:
        self.monitor = monitor
        self.changes = changes
        self.trouble: list[str] = []
        self.published = False
        self._token = f"pyqmigrate-{secrets.token_hex(8)}"
        self._target = target
        self._guardian: subprocess.Popen[bytes] | None = None
        self._finding: dict[str, Any] = {
            "monitor": os.fspath(Path(monitor.path).absolute()),
            "token": self._token,
            "resume": guest.running,
            "capabilities": {n: change.before for n, change in changes.capabilities.items()},
            "parameters": {
                **changes.touched, **{n: c.before for n, c in changes.parameters.items()}
            },
            "directory": os.path.realpath(Path(target.name).parent),
            "file": target.fd,
            "disks": [] if plan is None else [overlay.finding() for overlay in plan.overlays],
            "record": "" if plan is None else os.path.abspath(plan.record),  # noqa: PTH100
        }

    async def __aenter__(self) -> Self:
        self._start_guardian()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        if self._guardian is None:
            return
        try:
            await self.end()
        except QemuError as failed:
            # The first error says more; what became of the guest is added to it.
            if isinstance(error, BaseException):
                error.add_note(f"(the guest could not be put back at once: {failed}) ")
            elif kind is None:
                raise
        else:
            if isinstance(error, BaseException):
                for sentence in self.trouble:
                    error.add_note(f"({sentence}) ")

    async def apply(self) -> None:
        """Change the settings. QemuRefused when QEMU does not take one: then none of its kind."""
        if self._guardian is None or self._guardian.poll() is not None:
            raise QemuError("the guardian process ended by itself")
        if self.changes.parameters:
            wanted = {name: change.after for name, change in self.changes.parameters.items()}
            await self.monitor.execute("migrate-set-parameters", wanted)
        if self.changes.capabilities:
            entries = [
                {"capability": name, "state": change.after}
                for name, change in self.changes.capabilities.items()
            ]
            await self.monitor.execute("migrate-set-capabilities", {"capabilities": entries})

    @contextlib.asynccontextmanager
    async def lent(self, fds: Mapping[str, int]) -> AsyncIterator[str]:
        """Hand descriptors to QEMU; the path under which it opens them.

        When something fails meanwhile, they stay until everything is put back: a migration that
        looks for a descriptor in vain is the end of QEMU 10.0.2.
        """
        number: int | None = None
        for name, fd in fds.items():
            number = await self.monitor.add_fd(
                fd, fdset_id=number, opaque=f"{self._token} {name}"
            )
        yield f"/dev/fdset/{number}"
        await self.monitor.execute("remove-fd", {"fdset-id": number})

    async def end(self, *, resume: bool | None = None) -> None:
        """Put everything back and dismiss the guardian; ``resume``: whether the guest is to run,
        None for whether it ran. Cannot be interrupted halfway, and may be repeated.

        Raises QemuGone when QEMU is no more, QemuError when it does not do what it is told.
        """
        if self._guardian is None:
            return
        try:
            await unbroken(self._put_back(resume))
        except QemuGone:
            await unbroken(self._dismiss())  # there is nothing left to put back
            raise
        finally:
            self._let_go()

    async def _put_back(self, resume: bool | None) -> None:
        steps = guardian.put_back(self._finding, resume=resume, published=self.published)
        self.trouble += await drive(self.monitor, steps)
        await self._dismiss()

    def _start_guardian(self) -> None:
        """It holds the unfinished file open, and gets neither our signals nor our terminal."""
        command = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid())]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
            pass_fds=[self._target.fd],
        )  # fmt: skip
        self._guardian = process
        self._say(json.dumps(self._finding))

    def _say(self, line: str) -> None:
        assert self._guardian is not None and self._guardian.stdin is not None
        try:
            self._guardian.stdin.write(line.encode() + b"\n")
            self._guardian.stdin.flush()
        except BrokenPipeError as error:
            raise QemuError("the guardian process ended by itself") from error

    async def _dismiss(self) -> None:
        process = self._guardian
        if process is None:
            return
        with contextlib.suppress(QemuError):
            self._say("done")
        self._let_go()
        await asyncio.to_thread(process.wait)

    def _let_go(self) -> None:
        """Without a word before, the guardian goes to work when the monitor is free."""
        process, self._guardian = self._guardian, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()


async def drive(monitor: Monitor, steps: Generator[guardian.Step, Any, T]) -> T:
    """Carry out a guardian's steps on a session of our own; what they come to."""
    deadline = time.monotonic() + _PATIENCE
    try:
        step = next(steps)
        while True:
            if step is None:
                if time.monotonic() > deadline:
                    raise QemuError(
                        f"QEMU has not ended the migration {_PATIENCE:g} s after it was told to"
                    )
                await asyncio.sleep(guardian.A_MOMENT)
                step = next(steps)
                continue
            try:
                result = await monitor.execute(*step)
            except QemuRefused as error:
                step = steps.throw(guardian.Refused(error.desc))
            else:
                step = steps.send(result)
    except StopIteration as end:
        outcome: T = end.value
        return outcome
