"""The processor that a restore would make: by which QEMU, with which accelerator, of which CPU model.

    cpu = restore_cpu(snapshot, ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host"])
    check_host(snapshot, qemu=cpu.qemu, accelerator=cpu.accelerator, model=cpu.model)

Nothing is started.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pyqmigrate.errors import UsageError
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.vm.incoming.compatibility import accelerators
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.record.command import original_command
from pyqmigrate.vm.record.compare import compare_command_line
from pyqmigrate.vm.record.contents import VmRecord, read_record
from pyqmigrate.vm.record.place import SUFFIX, record_path
from pyqmigrate.vm.record.snapshot_identity import identify

__all__ = ["RestoreCpu", "recorded_model", "restore_cpu"]

_KVM = "/dev/kvm"
_32_BIT = "qemu-system-i386"


class RestoreCpu(NamedTuple):
    """What a command line makes. ``qemu`` is the program, ``model`` an argument of ``-cpu``.

    ``faults`` are differences from the recorded VM that a restore refuses, each with a remedy; ``notes``
    those that may be harmless.
    """

    qemu: str
    accelerator: str
    model: str
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def restore_cpu(snapshot: Snapshot, words: Sequence[str] | None = None) -> RestoreCpu:
    """Return the processor of a restore with a command line, by default the recorded one.

    Raises UsageError if there is none, or it cannot be used; SnapshotError for a damaged record,
    TargetError.
    """
    record = _record(snapshot)
    if words is not None:
        command = CommandLine.parse(words)
        faults, notes = ([], []) if record is None else compare_command_line(command, record)
    elif record is None:
        raise UsageError(
            f"the snapshot has no record ({snapshot.source.name + SUFFIX!r}) of its own: give the command "
            "line that the VM was started with after --"
        )
    else:
        assert snapshot.source.place is not None  # where the record is
        command = original_command(record, record_path(snapshot.source.place))
        faults, notes = [], []
    return RestoreCpu(
        _program(command), _accelerator(command), _model(command), tuple(faults), tuple(notes)
    )


def recorded_model(snapshot: Snapshot) -> str | None:
    """Return the CPU model of the command line that ``vm save`` recorded; None if none is known.

    Raises SnapshotError for a damaged record, TargetError.
    """
    record = _record(snapshot)
    if record is None or not record.command:
        return None
    try:
        return _model(CommandLine.parse(record.command))
    except UsageError:  # it has lost its end
        return None


def _record(snapshot: Snapshot) -> VmRecord | None:
    """Return the record of this snapshot, not of one that had its name before."""
    if snapshot.source.place is None:
        return None
    record = read_record(snapshot.source.place)
    if record is None:
        return None
    own = snapshot.changes if isinstance(snapshot, IncrementSnapshot) else snapshot
    if not isinstance(own, MappedRamSnapshot) or record.identity != identify(own):
        return None
    return record


def _program(command: CommandLine) -> str:
    if command.directory is None or os.sep not in command.program:
        return command.program
    return os.fspath(Path(command.directory, command.program))


def _accelerator(command: CommandLine) -> str:
    """Return the first one that can be used here, as QEMU chooses; its own default is TCG."""
    usable = [
        name
        for name in accelerators(command)
        if name != "kvm" or os.access(_KVM, os.R_OK | os.W_OK)
    ]
    return next(iter(usable or accelerators(command)), "tcg")


def _model(command: CommandLine) -> str:
    option = command.last("cpu")
    if option is not None and option.value:
        return option.value
    return "qemu32" if Path(command.program).name == _32_BIT else "qemu64"
