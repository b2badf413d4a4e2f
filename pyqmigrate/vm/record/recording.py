"""Write the record of a save (:mod:`pyqmigrate.vm.record.contents`).

    recording = await Recording.begin(monitor, guest, path, plan=plan, engine="qemu", way=None)
    ...                                 # the guest is stopped
    recording.see_disks()               # as they are at the snapshot's instant
    ...                                 # the snapshot is complete and has no name yet
    recording.prepare(target, ...)      # durable, under a provisional name
    ...                                 # the snapshot has its name
    recording.publish()

If the process is killed between the two names, the guardian
(:mod:`pyqmigrate.vm.outgoing.guardian`) completes the rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pyqmigrate.errors import TargetError, UsageError, target_error
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.own_files import FileKind, check_replaceable
from pyqmigrate.io.place import partial_name, sync_directory
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.vm.guest.disks import Disk, DiskPlan, seen_here
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.qemu.monitor import Monitor
from pyqmigrate.vm.qemu.process_command import read_command
from pyqmigrate.vm.record import facts as record_facts
from pyqmigrate.vm.record.contents import (
    DiskRecord,
    Image,
    ImageState,
    SaveFacts,
    VmRecord,
    encode_record,
    is_record,
    record_path,
)
from pyqmigrate.vm.record.disk_identity import look_at_image
from pyqmigrate.vm.record.snapshot_identity import identify

__all__ = ["RECORD", "Recording"]

RECORD = FileKind("record", is_record)


class Recording:
    """The record of a save in progress.

    ``path`` is its final path, ``provisional`` its path until the snapshot has its name. ``notes``
    describe what could not be recorded. ``published``: whether it has its final name.
    """

    def __init__(self, path: Path, guest: GuestInfo, draft: VmRecord) -> None:
        self.path = path
        mark = secrets.token_hex(8)
        self.provisional = path.with_name(partial_name(path.name, mark, path.parent))
        self.notes = list(_notes(draft))
        self.published = False
        self._guest = guest
        self._draft = draft
        self._states: dict[str, ImageState | None] = {}
        self._instant = 0
        self._overlays: dict[str, str] = {}

    @classmethod
    async def begin(
        cls,
        monitor: Monitor,
        guest: GuestInfo,
        snapshot: Path,
        *,
        plan: DiskPlan | None = None,
        engine: str,
        way: str | None = None,
        seal: str | None = None,
    ) -> Recording:
        """Query QEMU and its process for the facts to record.

        Raises UsageError if the record would replace another kind of file, TargetError, QemuError.
        """
        path = check_replaceable(record_path(snapshot), RECORD)
        command = read_command(guest.pid)
        draft = VmRecord(
            snapshot.name,
            "",
            record_facts.qemu_process(guest, command),
            await record_facts.machine(monitor, guest),
            await record_facts.cpus(monitor),
            record_facts.devices(guest),
            await record_facts.backends(monitor),
            record_facts.blocks(guest),
            (),
            SaveFacts(
                engine,
                way,
                seal,
                tuple(name for name, on in guest.capabilities.items() if on),
                guest.run_state,
                False,
                0,
            ),
        )
        self = cls(path, guest, draft)
        if plan is not None:
            self._overlays = {overlay.disk.node: overlay.file for overlay in plan.overlays}
        return self

    def see_disks(self) -> None:
        """Record the state of the writable disks' images while the guest is stopped.

        Later calls do nothing: they would not see the snapshot's instant.
        """
        if self._instant:
            return
        pid = self._guest.pid
        self._states = self._look(lambda file: seen_here(pid, file))
        self._instant = time.time_ns()

    def prepare(self, target: OutputFile, *, resumed: bool) -> None:
        """Write the record of the snapshot in ``target``, durable, under its provisional name.

        ``resumed``: whether the guest goes on. Raises SnapshotError, TargetError.
        """
        self.see_disks()
        draft = self._draft
        with (
            target.opened_for_reading() as fd,
            MappedRamSnapshot(StreamFile.open(Descriptors(fd)).without_header()) as snapshot,
        ):
            identity = identify(snapshot)
        self._draft = draft._replace(
            identity=identity, save=draft.save._replace(resumed=resumed, instant_ns=self._instant)
        )
        self._write()

    def publish(self) -> None:
        """Rename it to ``path``, once the snapshot has its name. ``notes`` report a failure."""
        try:
            check_replaceable(self.path, RECORD)
            self.provisional.replace(self.path)
            self.published = True
            sync_directory(self.path)
        except UsageError as error:
            self.notes.append(
                f"the snapshot is complete, but its record is {self.provisional.name!r}: {error}"
            )
        except OSError as error:
            what = (
                "may not survive a power failure"
                if self.published
                else f"could not be renamed, and is {self.provisional.name!r}"
            )
            self.notes.append(
                f"the snapshot is complete, but its record {os.fspath(self.path)!r} {what}: "
                f"{error.strerror}"
            )

    def discard(self) -> None:
        """Remove the prepared record of a snapshot that failed."""
        with contextlib.suppress(OSError):
            self.provisional.unlink()

    def see_end(self) -> None:
        """Record the disks again after QEMU has closed them, which may write to them.

        They are still at the snapshot's instant. A failure is put into ``notes``.
        """
        # They are found by name now: each must still be the same file.
        now = self._look(lambda file: Path(self._absolute(file)))
        before = self._states
        self._states = before | {
            file: state for file, state in now.items() if _is_same_file(state, before[file])
        }
        if not self.published or self._states == before:
            return
        try:
            self._write()
        except TargetError as error:
            self.notes.append(f"QEMU wrote to its disks when it ended, but {error}")
        else:
            self.publish()

    def _look(self, place: Callable[[str], Path]) -> dict[str, ImageState | None]:
        """Return the states of the writable disks' images; ``place`` maps QEMU's names to paths."""
        return {
            file: look_at_image(place(_plain(file)), qcow2=form == "qcow2")
            for disk in self._guest.disks
            if disk.writable
            for file, form, _ in _files(disk)
        }

    def _write(self) -> None:
        disks = tuple(self._disk(disk) for disk in self._guest.disks)
        data = encode_record(self._draft._replace(disks=disks))
        try:
            self.provisional.unlink(missing_ok=True)
            # Readable by the owner only: a command line may be confidential.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(self.provisional, flags, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
        except OSError as error:
            raise _failed(error, self.path) from error

    def _disk(self, disk: Disk) -> DiskRecord:
        images = tuple(
            Image(self._absolute(file), form, size, self._states.get(file))
            for file, form, size in _files(disk)
        )
        overlay = self._overlays.get(disk.node) if disk.writable else None
        return DiskRecord(
            disk.device,
            disk.qdev,
            disk.node,
            disk.writable,
            images,
            None if overlay is None else self._absolute(overlay),
            disk.writable and overlay is None and self._draft.save.resumed,
        )

    def _absolute(self, file: str) -> str:
        """Return the absolute name, for a QEMU with another working directory."""
        file = _plain(file)
        directory = self._draft.qemu.directory
        if directory is None or not file or file.startswith("/") or _is_description(file):
            return file
        return os.path.normpath(os.path.join(directory, file))  # not of this system


def _notes(draft: VmRecord) -> Iterator[str]:
    if draft.command is None:
        yield (
            "the command line of QEMU could not be read and is not recorded: give it to a restore "
            "after --"
        )
    elif draft.qemu.redacted:
        words = ", ".join(str(number) for number in draft.qemu.redacted)
        yield (
            f"the command line of QEMU contains secrets (word {words}), which are not recorded: "
            "give the whole command line to a restore after --"
        )


def _files(disk: Disk) -> Iterator[tuple[str, str, int]]:
    yield disk.file, disk.format, disk.size
    yield from ((image.file, image.format, image.size) for image in disk.chain)


def _plain(file: str) -> str:
    """Return the path in a description of an image, if that is all it contains."""
    if not file.startswith("json:"):
        return file.removeprefix("file:")
    try:
        node = json.loads(file.removeprefix("json:"))
    except (ValueError, RecursionError):
        return file
    while isinstance(node, dict) and isinstance(node.get("file"), dict):
        node = node["file"]
    if isinstance(node, dict) and node.get("driver") == "file":
        return str(node.get("filename", file))
    return file


def _is_description(file: str) -> bool:
    return file.startswith("json:") or ":" in file.partition("/")[0]


def _is_same_file(now: ImageState | None, before: ImageState | None) -> bool:
    if now is None or before is None:
        return False
    return (now.device, now.inode) == (before.device, before.inode)


def _failed(error: OSError, path: Path) -> TargetError:
    return target_error(error, "cannot write the record of the VM", path)
