"""Choose the command line of a restore: the given or the recorded one, compared with the record, and
with new overlays if requested.

    chosen = choose_command(source, ["qemu-system-x86_64", "-m", "4G"], DiskOptions())
    chosen.command, chosen.notes
    chosen.discard()                     # if no guest has run

This happens before QEMU starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pyqmigrate.errors import SnapshotError, UsageError
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.vm.incoming.identity import with_new_generation
from pyqmigrate.vm.incoming.options import DiskOptions
from pyqmigrate.vm.incoming.source import RestoreSource
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.record.place import SUFFIX, record_path

if TYPE_CHECKING:
    from pyqmigrate.vm.record.contents import VmRecord

__all__ = ["ChosenCommand", "CommandChoice", "choose_command"]


class ChosenCommand(NamedTuple):
    """A command line, notes on it, and the overlays that were created for it."""

    command: CommandLine
    notes: tuple[str, ...]
    overlays: list[Path]

    def discard(self) -> None:
        """Remove the overlays: no guest has run on them. Can be called again."""
        while self.overlays:
            self.overlays.pop().unlink(missing_ok=True)


def choose_command(
    source: RestoreSource, words: Sequence[str] | None, disks: DiskOptions
) -> ChosenCommand:
    """Return the command line of a single guest; see CommandChoice for the errors."""
    choice = CommandChoice(source, words, disks)
    return choice.settle(choice.command)


class CommandChoice:
    """The choice between given ``words`` and the record of ``source``.

    ``command`` is the chosen command line, unchanged except for a ``guid`` of ``vmgenid``; ``notes``
    apply to every guest. Raises UsageError if there is neither, or the recorded one cannot be used,
    SnapshotError for a damaged record, TargetError.
    """

    def __init__(
        self, source: RestoreSource, words: Sequence[str] | None, disks: DiskOptions
    ) -> None:
        self._disks = disks
        self._snapshot, self._in_view = source.name, source.view is not None
        self._place = source.place or Path()
        self._path = Path()
        self.notes: list[str] = []
        self._no_record = "the snapshot is not a file with a name"
        self._record = None if source.place is None else self._find_record(source, source.place)
        self._given = words is not None
        if words is not None:
            self.command = CommandLine.parse(words)
        elif self._record is None:
            raise UsageError(
                f"{self._no_record}: give the command line that the VM was started with after --"
            )
        else:
            from pyqmigrate.vm.record.command import recorded_command

            self.command, changes = recorded_command(self._record, self._path)
            self.notes += [f"the command line is from {self._shown!r}", *changes]
        self.command, renewed = with_new_generation(self.command)
        self.notes += renewed
        if disks.new_overlays and self._record is None:
            raise UsageError(f"cannot create overlays for the disks: {self._no_record}")

    def leave_monitors_out(self) -> None:
        """Leave out the recorded monitors, which several guests could not share."""
        from pyqmigrate.vm.record.command import without_monitors

        self.command, changes = without_monitors(self.command)
        self.notes += changes

    def settle(self, command: CommandLine, label: str = "") -> ChosenCommand:
        """Compare ``command``, which is :attr:`command` for one guest, with the record, and create
        its overlays.

        ``label`` is a prefix of the overlays' names. Raises UsageError if VM or disks are not the
        snapshot's, TargetError if an overlay cannot be created.
        """
        if self._record is None:
            return ChosenCommand(command, tuple(self.notes), [])
        return self._settle(command, self._record, label)

    def _find_record(self, source: RestoreSource, place: Path) -> VmRecord | None:
        self._path = path = record_path(place)
        self._no_record = f"the snapshot has no record ({self._shown!r})"
        if not os.path.lexists(path):
            return None
        from pyqmigrate.vm.record.contents import read_record
        from pyqmigrate.vm.record.snapshot_identity import identify

        try:
            record = read_record(place)
        except SnapshotError as error:
            raise SnapshotError(
                f"{error}: to restore by the command line alone, move the record away"
            ) from error
        if record is not None and not (
            isinstance(source.snapshot, MappedRamSnapshot)
            and record.identity == identify(source.snapshot)
        ):
            self._no_record = f"{self._shown!r} is the record of another snapshot"
            self.notes.append(f"{self._no_record} and is not used")
            return None
        return record

    @property
    def _shown(self) -> str:
        """The record, for messages."""
        return self._snapshot + SUFFIX if self._in_view else os.fspath(self._path)

    @property
    def _overlay_directory(self) -> Path:
        """Where the overlays are made. Raises UsageError if it has to be given."""
        if self._disks.directory is not None:
            return self._disks.directory
        if self._in_view:
            raise UsageError(
                f"the overlays cannot be beside {self._snapshot!r}: give their directory (--disks-dir)"
            )
        return self._path.parent

    def _settle(self, command: CommandLine, record: VmRecord, label: str) -> ChosenCommand:
        from pyqmigrate.vm.record.disk_check import check_disks

        notes = list(self.notes)
        if self._given:
            from pyqmigrate.vm.record.compare import compare_command_line

            faults, doubts = compare_command_line(command, record)
            if faults:
                raise UsageError("; ".join(faults))
            notes += doubts
        disks = check_disks(command, record, self._snapshot, overlays=self._disks.new_overlays)
        notes += disks.notes
        if disks.faults:
            if not self._disks.as_they_are:
                raise UsageError("; ".join(disks.faults) + " (--disks-as-they-are restores anyway)")
            notes += disks.faults
        if not disks.needs_overlay:
            return ChosenCommand(command, tuple(notes), [])
        from pyqmigrate.vm.incoming.overlays import with_overlays

        name = self._place.name if self._in_view else Path(self._snapshot).name
        command, overlays = with_overlays(
            command, disks.needs_overlay, self._overlay_directory, name, label
        )
        notes += [
            f"disk {disk.name} is the new overlay {os.fspath(path)!r} over {disk.file!r}"
            for disk, path in overlays
        ]
        return ChosenCommand(command, tuple(notes), [path for _, path in overlays])
