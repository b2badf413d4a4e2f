"""A guest in our hands: found in some state, and put back into it whatever happens.

    async with SaveTransaction(monitor, guest, "/snap/guest.mapped") as custody:
        async with custody.opened(DirectIO.AUTO) as target:
            await custody.apply(changes)
            await custody.migrate(path)
            ...
            await custody.resume()
            await custody.end(resume=True)

Leaving it without having called :meth:`SaveTransaction.end` puts everything back: a migration that was
begun here is cancelled, settings are what they were, the descriptors that QEMU was given are
removed, the guest runs if it ran, and its disks are the files that they were. The same is done by a
guardian process if this one is killed (:mod:`pyqmigrate.vm.outgoing.guardian`).

Others may have monitors, too. What they do to the guest meanwhile is not undone: what is done here
is written down just before (:class:`pyqmigrate.vm.outgoing.guardian.Step`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pyqmigrate.errors import QemuError, QemuGone, QemuRefused, target_error
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.in_use import InUse
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.place import resolve_symlink
from pyqmigrate.vm.cancellation import acquired, shielded
from pyqmigrate.vm.guest.disks import DiskPlan
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.outgoing import guardian
from pyqmigrate.vm.outgoing.disk_snapshots import take
from pyqmigrate.vm.outgoing.guardian import Step
from pyqmigrate.vm.plan.blockers import why_no_migration_now
from pyqmigrate.vm.plan.settings import Changes
from pyqmigrate.vm.qemu.event_log import EventLog
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.record.recording import Recording

__all__ = ["SaveTransaction", "drive"]

T = TypeVar("T")

_PATIENCE = 120.0  # seconds for QEMU to end what it was told to cancel
_OTHERS = 100  # moments for a migration of somebody else's


class SaveTransaction:
    """``snapshot`` is the path of the file that is to be written, and ``plan`` has the snapshots
    of disks that are taken along. ``recording`` sees the disks before the guest goes on.

    ``events`` is what QEMU has reported since the context was entered. ``trouble`` is what could
    not be put back, in QEMU's words. Once the snapshot has its name, set
    ``published``: its disks are not touched any more.
    """

    def __init__(
        self,
        monitor: Monitor,
        guest: GuestInfo,
        snapshot: str,
        plan: DiskPlan | None = None,
        recording: Recording | None = None,
    ) -> None:
        self.monitor = monitor
        self.guest = guest
        self.trouble: list[str] = []
        self.published = False
        self.events: EventLog
        self._token = f"pyqmigrate-{secrets.token_hex(8)}"
        self._snapshot = snapshot
        self._plan = plan
        self._recording = recording
        self._guardian: subprocess.Popen[bytes] | None = None
        self._news: socket.socket | None = None
        self._finding: dict[str, Any] = {
            "monitor": os.fspath(Path(monitor.path).absolute()),
            "pid": guest.pid,
            "snapshot": os.path.abspath(snapshot),  # noqa: PTH100
            "token": self._token,
            "resume": guest.running,
            "did": [],
            "capabilities": {},
            "parameters": {},
            "directory": os.path.realpath(resolve_symlink(snapshot).parent),
            "file": False,
            "disks": [] if plan is None else [overlay.finding() for overlay in plan.overlays],
            "record": "" if recording is None else os.fspath(recording.path),
            "provisional": "" if recording is None else os.fspath(recording.provisional),
        }

    async def __aenter__(self) -> Self:
        self._start_guardian()
        self.events = EventLog(self.monitor)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        self.events.close()
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

    @contextlib.asynccontextmanager
    async def opened(
        self, direct_io: DirectIO, *, in_use: InUse, beside: Collection[Path] = ()
    ) -> AsyncIterator[OutputFile]:
        """The file to write, unfinished; gone afterwards unless it was published.

        Before anything is touched it is compared with the files ``in_use``, and so are the files
        ``beside`` it that will be written too.
        """
        opening = asyncio.to_thread(
            OutputFile.open,
            self._snapshot,
            direct_io,
            in_use=in_use,
            beside=beside,
            mark=self._token,
        )
        target = await acquired(opening, OutputFile.abort)
        try:
            self._tell(file=True, fds=(target.fd,))
            yield target
        finally:
            target.abort()

    async def apply(self, changes: Changes) -> None:
        """Change settings. QemuRefused when QEMU does not take one: then none of its kind."""
        if self._guardian is None or self._guardian.poll() is not None:
            raise QemuError("the guardian process ended by itself")
        # Another monitor's client may have begun one since the guest was looked at.
        status = (await self.monitor.execute("query-migrate")).get("status", "none")
        if (why_not := why_no_migration_now(str(status))) is not None:
            raise QemuError(why_not)
        self._tell(
            capabilities={name: change.before for name, change in changes.capabilities.items()},
            parameters={
                **changes.touched,
                **{n: change.before for n, change in changes.parameters.items()},
            },
        )
        if changes.parameters or changes.capabilities:
            self._note(Step.SETTINGS)
        if changes.parameters:
            wanted = {name: change.after for name, change in changes.parameters.items()}
            await self.monitor.execute("migrate-set-parameters", wanted)
        if changes.capabilities:
            entries = [
                {"capability": name, "state": change.after}
                for name, change in changes.capabilities.items()
            ]
            await self.monitor.execute("migrate-set-capabilities", {"capabilities": entries})

    async def take_disks(self) -> None:
        """Take the snapshots of disks that were planned, all or none."""
        if self._plan is not None:
            self._note(Step.DISKS)
            self.events.stands()
            await take(self.monitor, self._plan)

    async def stop(self) -> None:
        """Let the guest stand still."""
        self._note(Step.STOPPED)
        await self.monitor.execute("stop")

    async def migrate(self, path: str) -> None:
        """Begin to migrate to the file ``path``. QemuRefused when QEMU does not, as it does when
        somebody else was faster."""
        self._note(Step.SETTINGS, Step.MIGRATING)
        try:
            await self.monitor.execute("migrate", {"uri": f"file:{path}"})
        except QemuRefused:
            self._note(without=(Step.MIGRATING,))
            raise

    def migrated(self) -> None:
        """The migration that was begun here has ended, well or not."""
        self._note(Step.MIGRATED, without=(Step.MIGRATING,))

    async def check_that_it_stood(self) -> None:
        """Raise QemuError when another client has let the guest run since ``events.stands()``."""
        await self.monitor.execute("query-status")  # its answer comes after all events before it
        if self.events.resumed():
            raise QemuError(
                "another client let the guest run while it was saved: the snapshot would not be of "
                "one instant"
            )

    async def resume(self) -> None:
        """Let the guest go on. QemuError when it is not here that it was made to stand."""
        state = (await self.monitor.execute("query-status"))["status"]
        did = set(self._finding["did"])
        if (
            state == "postmigrate"
            and not did & {Step.MIGRATING, Step.MIGRATED}
            and (self.guest.run_state != state)
        ):
            raise QemuError(
                "somebody else has migrated the guest meanwhile: it may run elsewhere by now"
            )
        if self._recording is not None:
            await asyncio.to_thread(self._recording.see_disks)
        await self.monitor.execute("cont")
        self._note(without=(Step.STOPPED, Step.MIGRATED))

    @contextlib.asynccontextmanager
    async def lent(self, fds: Mapping[str, int]) -> AsyncIterator[str]:
        """Hand descriptors to QEMU; the path under which it opens them.

        When something fails meanwhile, they stay until everything is put back: a migration that
        looks for a descriptor in vain is the end of QEMU 10.0.2.
        """
        number: int | None = None
        self._note(Step.LENT)
        for name, fd in fds.items():
            number = await self.monitor.add_fd(fd, fdset_id=number, opaque=f"{self._token} {name}")
        yield f"/dev/fdset/{number}"
        await self.monitor.execute("remove-fd", {"fdset-id": number})

    async def end(self, *, resume: bool | None = None) -> None:
        """Put everything back and dismiss the guardian; ``resume``: whether the guest is to run,
        None for whether it ran. Cannot be interrupted halfway, and may be repeated.

        The guardian stays while a migration of somebody else's is under way, to put settings back
        when that has ended; ``trouble`` says so.

        Raises QemuGone when QEMU is no more, QemuError when it does not do what it is told.
        """
        if self._guardian is None:
            return
        try:
            await shielded(self._put_back(resume))
        except QemuGone:
            await shielded(self._dismiss())  # there is nothing left to put back
            raise
        finally:
            self._let_go()

    async def _put_back(self, resume: bool | None) -> None:
        if resume is not None:
            self._tell(resume=resume)
        steps = guardian.rollback_steps(
            self._finding, resume=resume, published=self.published, patience=_OTHERS
        )
        try:
            self.trouble += await drive(self.monitor, steps)
        except guardian.Busy:
            self.trouble.append(
                "somebody else's migration of this guest is under way: a guardian process waits "
                "for its end to put the settings back"
            )
            self._tell(did=[Step.SETTINGS], disks=[])
        else:
            await self._dismiss()

    def _start_guardian(self) -> None:
        """It gets neither our signals nor our terminal."""
        command = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), self._snapshot]
        ours, its = socket.socketpair()
        try:
            with its:
                self._guardian = subprocess.Popen(
                    command,
                    stdin=its.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                )
        except OSError as error:
            ours.close()
            raise target_error(error, "cannot start the guardian process") from error
        self._news = ours
        self._say(json.dumps(self._finding))

    def _note(self, *done: str, without: Collection[str] = ()) -> None:
        """What is done to QEMU; said before it is done, and taken back when it is undone."""
        did = [word for word in self._finding["did"] if word not in without]
        self._tell(did=[*did, *(word for word in done if word not in did)])

    def _tell(self, *, fds: Sequence[int] = (), **news: Any) -> None:
        self._finding |= news
        if self._guardian is not None:
            # Should it have died, the guest is best served by going on.
            with contextlib.suppress(QemuError):
                self._say(json.dumps(news), fds)

    def _say(self, line: str, fds: Sequence[int] = ()) -> None:
        assert self._news is not None
        text = line.encode() + b"\n"
        try:
            sent = socket.send_fds(self._news, [text], fds) if fds else 0
            self._news.sendall(text[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
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
        self._guardian = None
        if self._news is not None:
            self._news.close()


async def drive(monitor: Monitor, steps: Generator[guardian.Command, Any, T]) -> T:
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
