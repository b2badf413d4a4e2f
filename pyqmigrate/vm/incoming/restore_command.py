"""The command line of a restore: the one that is given or the one of the record, held against what
the record knows, with new overlays where they are asked for.

    chosen = choose_command(source, ["qemu-system-x86_64", "-m", "4G"], DiskOptions())
    chosen.command, chosen.notes
    chosen.discard()                     # when no guest has run

All of it happens before a QEMU starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.vm.incoming.identity import with_new_generation
from pyqmigrate.vm.incoming.options import DiskOptions
from pyqmigrate.vm.incoming.source import RestoreSource
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.record.place import record_path

if TYPE_CHECKING:
    from pyqmigrate.vm.record.contents import VmRecord

__all__ = ["ChosenCommand", "CommandChoice", "choose_command"]


@dataclass(frozen=True)
class ChosenCommand:
    """``command``, what is to be noted about it, and the overlays that were made for it."""

    command: CommandLine
    notes: tuple[str, ...] = ()
    overlays: list[Path] = field(default_factory=list)

    def discard(self) -> None:
        """Remove the overlays: no guest has run on them. May be repeated."""
        while self.overlays:
            self.overlays.pop().unlink(missing_ok=True)


def choose_command(
    source: RestoreSource, words: Sequence[str] | None, disks: DiskOptions
) -> ChosenCommand:
    """The command line of the one guest that is restored from ``source``; see CommandChoice."""
    choice = CommandChoice(source, words, disks)
    return choice.settle(choice.command)


class CommandChoice:
    """What there is to choose from: the ``words`` that were given, or the record of ``source``.

    ``command`` is what was chosen, as it was written but for a number of ``vmgenid``, and ``notes``
    are those of every guest that it makes. Raises UsageError where there is neither, or
    the recorded one cannot be used, SnapshotError for a record that is damaged, TargetError.
    """

    def __init__(
        self, source: RestoreSource, words: Sequence[str] | None, disks: DiskOptions
    ) -> None:
        self._disks = disks
        self._snapshot = source.name
        self._path = Path()
        self.notes: list[str] = []
        self._lack = "the snapshot is not a file with a name"
        self._record = None if source.place is None else self._find_record(source, source.place)
        self._given = words is not None
        if words is not None:
            self.command = CommandLine.parse(words)
        elif self._record is None:
            raise UsageError(
                f"{self._lack}: give the command line that the VM was started with after --"
            )
        else:
            from pyqmigrate.vm.record.command import recorded_command

            self.command, changes = recorded_command(self._record, self._path)
            self.notes += [f"the command line is that of {os.fspath(self._path)!r}", *changes]
        self.command, renewed = with_new_generation(self.command)
        self.notes += renewed
        if disks.new_overlays and self._record is None:
            raise UsageError(f"no overlays can be made for the disks: {self._lack}")

    def leave_monitors_out(self) -> None:
        """For guests that get monitors of their own, and could not share the recorded ones."""
        from pyqmigrate.vm.record.command import without_monitors

        self.command, changes = without_monitors(self.command)
        self.notes += changes

    def settle(self, command: CommandLine, label: str = "") -> ChosenCommand:
        """``command``, which is :attr:`command` for one guest of several, held against the record.

        ``label`` is put before the names of overlays. Raises UsageError for what is not the
        snapshot's VM, or its disks; TargetError where an overlay cannot be made.
        """
        if self._record is None:
            return ChosenCommand(command, tuple(self.notes))
        return self._settle(command, self._record, label)

    def _find_record(self, source: RestoreSource, place: Path) -> VmRecord | None:
        self._path = path = record_path(place)
        self._lack = f"the snapshot has no record ({os.fspath(path)!r})"
        if not os.path.lexists(path):
            return None
        from pyqmigrate.vm.record.contents import read_record
        from pyqmigrate.vm.record.snapshot_identity import identify

        try:
            record = read_record(place)
        except SnapshotError as error:
            raise SnapshotError(
                f"{error}: move it away to restore without it, by the command line alone"
            ) from error
        if record is not None and record.identity != identify(source.snapshot):
            self._lack = f"{os.fspath(path)!r} is the record of another snapshot"
            self.notes.append(f"{self._lack}, and is not used")
            return None
        return record

    def _settle(self, command: CommandLine, record: VmRecord, label: str) -> ChosenCommand:
        from pyqmigrate.vm.record.disk_check import check_disks

        notes = list(self.notes)
        if self._given:
            from pyqmigrate.vm.record.compare import compare_command_line

            faults, doubts = compare_command_line(command, record)
            if faults:
                raise UsageError("; ".join(faults))
            notes += doubts
        found = check_disks(command, record, self._snapshot, overlays=self._disks.new_overlays)
        notes += found.notes
        if found.faults:
            if not self._disks.as_they_are:
                raise UsageError(
                    "; ".join(found.faults) + " (--disks-as-they-are restores all the same)"
                )
            notes += found.faults
        chosen = ChosenCommand(command, tuple(notes))
        if not found.needs_overlay:
            return chosen
        from pyqmigrate.vm.incoming.overlays import with_overlays

        directory = self._disks.directory or self._path.parent
        made, overlays = with_overlays(
            command, found.needs_overlay, directory, Path(self._snapshot).name, label
        )
        notes += [
            f"disk {disk.name} is {os.fspath(path)!r}, over {disk.file!r}"
            for disk, path in overlays
        ]
        return ChosenCommand(made, tuple(notes), [path for _, path in overlays])
