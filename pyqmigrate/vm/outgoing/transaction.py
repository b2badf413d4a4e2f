"""A save as a transaction on a guest: committed, or rolled back to the state it was found in.

    async with SaveTransaction(monitor, guest, "/snap/guest.mapped") as transaction:
        async with transaction.open_output(DirectIO.AUTO, in_use=in_use) as output:
            async with transaction.add_fds(fds) as path:
                await transaction.apply(changes)
                await transaction.migrate(path)
                ...
                await transaction.resume()
            output.publish(...)
            await transaction.commit(resume=True)

Leaving the context without :meth:`SaveTransaction.commit` rolls back: the save's migration is
cancelled, settings are restored, added descriptors are removed, the guest runs if it ran before, and
its overlays are committed into its disks. If this process is killed, a guardian process does the
same (:mod:`pyqmigrate.vm.outgoing.guardian`).

Other clients may use other monitors of the same QEMU. Only the save's own steps are undone, so each
is journaled just before it is done (:class:`pyqmigrate.vm.outgoing.guardian.Step`).
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
from pyqmigrate.vm.outgoing.disk_snapshots import create, take
from pyqmigrate.vm.outgoing.guardian import Step
from pyqmigrate.vm.outgoing.timeline import Lane, Timeline
from pyqmigrate.vm.plan.blockers import why_no_migration_now
from pyqmigrate.vm.plan.settings import Changes
from pyqmigrate.vm.qemu.event_log import EventLog
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.record.recording import Recording

__all__ = ["SaveTransaction", "run_commands"]

T = TypeVar("T")

# Times in seconds.
_CANCEL_TIMEOUT = 120.0
_OTHER_MIGRATION_TIMEOUT = 1.0


class SaveTransaction:
    """The steps of one save of ``guest`` into the file ``snapshot``.

    ``plan`` has the disk snapshots to take. ``recording`` looks at the disks before the guest goes
    on. ``timeline`` notes what happens when. ``events`` is QEMU's since the context was entered.
    ``rollback_errors`` are sentences on what could not be undone.
    """

    def __init__(
        self,
        monitor: Monitor,
        guest: GuestInfo,
        snapshot: str,
        plan: DiskPlan | None = None,
        recording: Recording | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.monitor = monitor
        self.timeline = Timeline(time.monotonic()) if timeline is None else timeline
        self.guest = guest
        self.rollback_errors: list[str] = []
        self.events: EventLog
        self._token = f"pyqmigrate-{secrets.token_hex(8)}"
        self._snapshot = snapshot
        self._plan = plan
        self._recording = recording
        self._output: OutputFile | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None  # to the guardian
        self._journal: dict[str, Any] = {
            "monitor": os.fspath(Path(monitor.path).absolute()),
            "pid": guest.pid,
            "threads": _threads(guest.pid),
            "snapshot": os.path.abspath(snapshot),
            "token": self._token,
            "resume": guest.running,
            "steps": [],
            "capabilities": {},
            "parameters": {},
            "directory": os.path.realpath(resolve_symlink(snapshot).parent),
            "file": False,
            "disks": [] if plan is None else [overlay.journal_entry() for overlay in plan.overlays],
            "record": "" if recording is None else os.fspath(recording.path),
            "provisional": "" if recording is None else os.fspath(recording.provisional),
        }

    @property
    def published(self) -> bool:
        """Whether the snapshot has its name. Then its overlays stay, whatever fails."""
        return self._output is not None and self._output.published

    async def __aenter__(self) -> Self:
        self._start_guardian()
        self.events = EventLog(self.monitor)
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self.events.close()
        if self._guardian is None:
            return
        try:
            await self.rollback()
        except QemuError as failed:
            if error is None:
                raise
            # The first error says more.
            error.add_note(f"(the guest could not be restored: {failed}) ")
        else:
            if error is not None:
                for sentence in self.rollback_errors:
                    error.add_note(f"({sentence}) ")

    @contextlib.asynccontextmanager
    async def open_output(
        self, direct_io: DirectIO, *, in_use: InUse, beside: Collection[Path] = ()
    ) -> AsyncIterator[OutputFile]:
        """Open the file to write; it is removed afterwards unless it was published.

        First the file, and the files ``beside`` it that will be written too, are compared with
        those ``in_use``.
        """
        opening = asyncio.to_thread(
            OutputFile.open,
            self._snapshot,
            direct_io,
            in_use=in_use,
            beside=beside,
            mark=self._token,
        )
        self._output = output = await acquired(opening, OutputFile.abort)
        try:
            self._write_journal(file=True, fds=(output.fd,))
            yield output
        finally:
            output.abort()

    async def apply(self, changes: Changes) -> None:
        """Change settings. Raises QemuRefused if QEMU refuses one; then none of its kind changes.

        QemuError is raised if another client's migration is active.
        """
        if self._guardian is None or self._guardian.poll() is not None:
            raise QemuError("the guardian process ended unexpectedly")
        await self.check_no_migration()
        self._write_journal(
            capabilities={name: change.before for name, change in changes.capabilities.items()},
            parameters={
                **changes.touched,
                **{name: change.before for name, change in changes.parameters.items()},
            },
        )
        if changes.parameters or changes.capabilities:
            self._journal_steps(Step.SETTINGS)
        if changes.parameters:
            wanted = {name: change.after for name, change in changes.parameters.items()}
            await self.monitor.execute("migrate-set-parameters", wanted)
        if changes.capabilities:
            entries = [
                {"capability": name, "state": change.after}
                for name, change in changes.capabilities.items()
            ]
            await self.monitor.execute("migrate-set-capabilities", {"capabilities": entries})

    async def check_no_migration(self) -> None:
        """Raise QemuError if another client has started a migration since the guest was inspected."""
        status = (await self.monitor.execute("query-migrate")).get("status", "none")
        if (why_not := why_no_migration_now(str(status))) is not None:
            raise QemuError(why_not)

    async def create_overlays(self) -> None:
        """Create the files of the planned disk snapshots, while the guest still runs."""
        if self._plan is not None and self._plan.overlays:
            self._journal_steps(Step.DISKS)
            await create(self.monitor, self._plan)

    async def take_disks(self) -> None:
        """Take the planned disk snapshots, all or none."""
        if self._plan is not None:
            self._journal_steps(Step.DISKS)
            self.events.mark_stopped()
            with self.timeline.phase(Lane.QEMU, "disk snapshots"):
                await take(self.monitor, self._plan)

    async def stop(self) -> None:
        """Stop the guest."""
        self._journal_steps(Step.STOPPED)
        await self.monitor.execute("stop")

    async def migrate(self, path: str, *, background: bool = False) -> None:
        """Start to migrate to the file ``path``; ``background``: as a background snapshot. Raises
        QemuRefused if QEMU refuses, as it does when another client's migration is active."""
        kind = (Step.BACKGROUND,) if background else ()
        self._journal_steps(Step.SETTINGS, Step.MIGRATING, *kind)
        try:
            await self.monitor.execute("migrate", {"uri": f"file:{path}"})
        except QemuRefused:
            self._journal_steps(undone=(Step.MIGRATING, Step.BACKGROUND))
            raise

    def migration_ended(self) -> None:
        """Note that the migration has ended, successfully or not."""
        self._journal_steps(Step.MIGRATED, undone=(Step.MIGRATING,))

    async def went_on(self) -> None:
        """Note that the guest was resumed since ``events.mark_stopped()``: if another client has
        stopped it again, it stays stopped."""
        running = (await self.monitor.execute("query-status"))["running"]
        if running or self.events.resumed():
            self._journal_steps(undone=(Step.STOPPED, Step.MIGRATED))

    async def check_still_stopped(self) -> None:
        """Raise QemuError if another client has resumed the guest since ``events.mark_stopped()``."""
        await self.monitor.execute("query-status")  # its reply follows all earlier events
        if self.events.resumed():
            raise QemuError(
                "another client resumed the guest during the save: the snapshot would not be of "
                "one instant"
            )

    async def resume(self) -> None:
        """Resume the guest. Raises QemuError if another client has migrated it."""
        if not {Step.MIGRATING, Step.MIGRATED} & set(self._journal["steps"]):
            state = (await self.monitor.execute("query-status"))["status"]
            if state == "postmigrate" and self.guest.run_state != state:
                raise QemuError(
                    "another client has migrated the guest during the save: it may run elsewhere "
                    "now"
                )
        if self._recording is not None:
            await asyncio.to_thread(self._recording.see_disks)
        await self.monitor.execute("cont")
        self._journal_steps(undone=(Step.STOPPED, Step.MIGRATED))

    @contextlib.asynccontextmanager
    async def add_fds(self, fds: Mapping[str, int]) -> AsyncIterator[str]:
        """Add descriptors to QEMU as a fdset; yields the path at which QEMU opens them.

        After an error they stay until the rollback: QEMU 10.0.2 crashes when a migration does not
        find a descriptor.
        """
        number: int | None = None
        self._journal_steps(Step.FDS)
        for name, fd in fds.items():
            number = await self.monitor.add_fd(fd, fdset_id=number, opaque=f"{self._token} {name}")
        yield f"/dev/fdset/{number}"
        await self.monitor.execute("remove-fd", {"fdset-id": number})

    async def commit(self, *, resume: bool) -> None:
        """End the save of a published snapshot, and let the guest run if ``resume`` says so.

        Its overlays stay; settings and descriptors are restored as by :meth:`rollback`, which has
        the errors.
        """
        assert self.published
        await self._finish(resume)

    async def rollback(self) -> None:
        """Leave the guest as it was found, and dismiss the guardian. Not interrupted by
        cancellation; idempotent.

        The overlays of a published snapshot stay. While another client's migration is active, the
        guardian stays to restore settings after it; ``rollback_errors`` says so.

        Raises QemuGone if QEMU has ended, QemuError if it does not carry out a command.
        """
        await self._finish(None)

    async def _finish(self, resume: bool | None) -> None:
        if self._guardian is None:
            return
        try:
            await shielded(self._restore(resume))
        except QemuGone:
            await shielded(self._dismiss_guardian())  # nothing is left to restore
            raise
        finally:
            self._close_channel()

    async def _restore(self, resume: bool | None) -> None:
        if resume is not None:
            self._write_journal(resume=resume)
        commands = guardian.rollback_steps(
            self._journal, resume=resume, published=self.published, timeout=_OTHER_MIGRATION_TIMEOUT
        )
        try:
            self.rollback_errors += await run_commands(self.monitor, commands)
        except guardian.Busy:
            self.rollback_errors.append(
                "another client's migration of this guest is active: a guardian process waits for "
                "its end to restore the settings"
            )
            self._write_journal(steps=[Step.SETTINGS], disks=[])
        else:
            await self._dismiss_guardian()

    def _start_guardian(self) -> None:
        """Start it without our signals and terminal."""
        command = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), self._snapshot]
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._guardian = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                )
        except OSError as error:
            ours.close()
            raise target_error(error, "cannot start the guardian process") from error
        self._channel = ours
        self._send(json.dumps(self._journal))

    def _journal_steps(self, *steps: Step, undone: Collection[Step] = ()) -> None:
        """Journal steps before they are done, and remove those that were undone."""
        kept = [step for step in self._journal["steps"] if step not in undone]
        self._write_journal(steps=[*kept, *(step for step in steps if step not in kept)])

    def _write_journal(self, *, fds: Sequence[int] = (), **entries: Any) -> None:
        self._journal |= entries
        if self._guardian is not None:
            # If it has ended, the save's own rollback still protects the guest.
            with contextlib.suppress(QemuError):
                self._send(json.dumps(entries), fds)

    def _send(self, line: str, fds: Sequence[int] = ()) -> None:
        assert self._channel is not None
        text = line.encode() + b"\n"
        try:
            sent = socket.send_fds(self._channel, [text], fds) if fds else 0
            self._channel.sendall(text[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise QemuError("the guardian process ended unexpectedly") from error

    async def _dismiss_guardian(self) -> None:
        process = self._guardian
        if process is None:
            return
        with contextlib.suppress(QemuError):
            self._send("done")
        self._close_channel()
        await asyncio.to_thread(process.wait)

    def _close_channel(self) -> None:
        """Close it; a guardian that was not dismissed rolls back once the monitor is free."""
        self._guardian = None
        if self._channel is not None:
            self._channel.close()


def _threads(pid: int | None) -> list[int]:
    try:
        return [] if pid is None else [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


async def run_commands(monitor: Monitor, commands: Generator[guardian.Command, Any, T]) -> T:
    """Run a guardian's commands on ``monitor``; return the generator's result."""
    deadline = time.monotonic() + _CANCEL_TIMEOUT
    try:
        command = next(commands)
        while True:
            if command is None:
                if time.monotonic() > deadline:
                    raise QemuError(
                        f"QEMU has not ended the migration within {_CANCEL_TIMEOUT:g} s"
                    )
                await asyncio.sleep(guardian.POLL_INTERVAL)
                command = next(commands)
                continue
            try:
                result = await monitor.execute(*command)
            except QemuRefused as error:
                command = commands.throw(guardian.Refused(error.desc))
            else:
                command = commands.send(result)
    except StopIteration as end:
        outcome: T = end.value
        return outcome
