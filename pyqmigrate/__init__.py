"""Save, restore and work with the memory of QEMU virtual machines at the speed of the disk.

The main job: guest memory into a file that QEMU loads (its ``mapped-ram`` format), and back::

    import pyqmigrate

    report = pyqmigrate.save("/snap/guest.mapped", [pyqmigrate.RamBlock("pc.ram", memory)])

    with pyqmigrate.open_snapshot("/snap/guest.mapped") as snapshot:
        snapshot.load({"pc.ram": memory})

``memory`` is any object with the buffer protocol, or ``FileMemory(fd)``. Start reading at
:func:`save` and :class:`Snapshot`; :mod:`pyqmigrate.errors` explains the exceptions.
:mod:`pyqmigrate.vm` works with a running QEMU, :mod:`pyqmigrate.qmp` is a QMP server for a VMM.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # the one place: the build reads it

from pyqmigrate.errors import (
    BlockMismatch,
    Cancelled,
    DirectIORefused,
    GuestMemoryError,
    JobTimeout,
    LiveSaveAbandoned,
    NoSpace,
    NotDurable,
    NotSupported,
    PyqmigrateError,
    QemuError,
    QemuGone,
    QemuRefused,
    SnapshotError,
    SnapshotTruncated,
    TargetError,
    UsageError,
)

if TYPE_CHECKING:
    from pyqmigrate.analysis.comparison import diff
    from pyqmigrate.analysis.report import BlockDiff, DeviceDiff, DiffReport, FieldDiff, PageRange
    from pyqmigrate.api import save, start_save
    from pyqmigrate.compaction import CompactReport, compact
    from pyqmigrate.enums import Clear, Format
    from pyqmigrate.export.convert import convert
    from pyqmigrate.export.image import ImageReport
    from pyqmigrate.format.address_space.physical_map import parse_placement
    from pyqmigrate.format.address_space.placement import Placement
    from pyqmigrate.format.device.cpu import CpuRegisters, cpu_registers
    from pyqmigrate.format.device.sections import DeviceSection
    from pyqmigrate.format.device.values import Device
    from pyqmigrate.format.digest import Algorithm
    from pyqmigrate.integrity.seal import SealReport, seal
    from pyqmigrate.integrity.verify import SealCheck, verify_seal
    from pyqmigrate.io.direct_io import DirectIO
    from pyqmigrate.io.job import Job, Progress
    from pyqmigrate.io.memory import FileMemory, ProcessMemory, RamBlock
    from pyqmigrate.io.target import Descriptors
    from pyqmigrate.migration import Guest, Migration
    from pyqmigrate.migration.fdset import FdsetError, FdSets
    from pyqmigrate.qapi.capabilities import Capabilities
    from pyqmigrate.qapi.parameters import Parameters
    from pyqmigrate.qapi.policy import Policy
    from pyqmigrate.snapshot.base import Block, Snapshot
    from pyqmigrate.snapshot.detect import open_snapshot
    from pyqmigrate.snapshot.devices import Devices, devices
    from pyqmigrate.snapshot.increment import IncrementBlock, IncrementSnapshot
    from pyqmigrate.snapshot.load.mapped_ram import LoadReport
    from pyqmigrate.snapshot.mapped_ram import MappedRamBlock, MappedRamSnapshot, start_load
    from pyqmigrate.snapshot.provenance import Provenance, provenance
    from pyqmigrate.snapshot.save.writer import SaveReport, Sparse
    from pyqmigrate.snapshot.sequential import SequentialSnapshot

__all__ = [
    # The main job.
    "save",
    "open_snapshot",
    "Snapshot",
    "Block",
    "convert",
    "compact",
    "diff",
    "seal",
    "verify_seal",
    # Memory and targets.
    "RamBlock",
    "FileMemory",
    "ProcessMemory",
    "Descriptors",
    # Jobs and their reports.
    "start_save",
    "start_load",
    "Job",
    "Progress",
    "SaveReport",
    "LoadReport",
    "SealReport",
    "SealCheck",
    "Algorithm",
    # Kinds of snapshots, and their conversion.
    "MappedRamBlock",
    "MappedRamSnapshot",
    "SequentialSnapshot",
    "IncrementBlock",
    "IncrementSnapshot",
    "Format",
    "ImageReport",
    "CompactReport",
    "Placement",
    "parse_placement",
    # The comparison of two snapshots.
    "DiffReport",
    "BlockDiff",
    "PageRange",
    "DeviceDiff",
    "FieldDiff",
    # Device state, and the origin of a file.
    "devices",
    "Devices",
    "Device",
    "cpu_registers",
    "CpuRegisters",
    "provenance",
    "Provenance",
    # Options.
    "DirectIO",
    "Sparse",
    "Clear",
    # QEMU's migration for a VMM.
    "Migration",
    "Guest",
    "DeviceSection",
    "FdSets",
    "Capabilities",
    "Parameters",
    "Policy",
    # Errors, most generic to most explicit.
    "PyqmigrateError",
    "SnapshotError",
    "SnapshotTruncated",
    "UsageError",
    "BlockMismatch",
    "TargetError",
    "NoSpace",
    "NotDurable",
    "DirectIORefused",
    "GuestMemoryError",
    "QemuError",
    "QemuRefused",
    "QemuGone",
    "LiveSaveAbandoned",
    "NotSupported",
    "Cancelled",
    "JobTimeout",
    "FdsetError",
]

# Modules are imported on first use: a command that restores a guest has no time for the rest. No
# module or folder here has the name of a public function, because importing it would hide that.
_HOME = {
    "diff": "analysis.comparison",
    "BlockDiff": "analysis.report",
    "DeviceDiff": "analysis.report",
    "DiffReport": "analysis.report",
    "FieldDiff": "analysis.report",
    "PageRange": "analysis.report",
    "compact": "compaction",
    "CompactReport": "compaction",
    "SequentialSnapshot": "snapshot.sequential",
    "Devices": "snapshot.devices",
    "devices": "snapshot.devices",
    "Format": "enums",
    "convert": "export.convert",
    "ImageReport": "export.image",
    "FdsetError": "migration.fdset",
    "FdSets": "migration.fdset",
    "CpuRegisters": "format.device.cpu",
    "cpu_registers": "format.device.cpu",
    "Device": "format.device.values",
    "DeviceSection": "format.device.sections",
    "parse_placement": "format.address_space.physical_map",
    "Placement": "format.address_space.placement",
    "Algorithm": "format.digest",
    "Job": "io.job",
    "Progress": "io.job",
    "FileMemory": "io.memory",
    "ProcessMemory": "io.memory",
    "RamBlock": "io.memory",
    "Descriptors": "io.target",
    "DirectIO": "io.direct_io",
    "Clear": "enums",
    "LoadReport": "snapshot.load.mapped_ram",
    "Guest": "migration",
    "Migration": "migration",
    "open_snapshot": "snapshot.detect",
    "Capabilities": "qapi.capabilities",
    "Parameters": "qapi.parameters",
    "Policy": "qapi.policy",
    "Provenance": "snapshot.provenance",
    "provenance": "snapshot.provenance",
    "SaveReport": "snapshot.save.writer",
    "save": "api",
    "start_save": "api",
    "SealCheck": "integrity.verify",
    "SealReport": "integrity.seal",
    "seal": "integrity.seal",
    "verify_seal": "integrity.verify",
    "Block": "snapshot.base",
    "Snapshot": "snapshot.base",
    "IncrementBlock": "snapshot.increment",
    "IncrementSnapshot": "snapshot.increment",
    "MappedRamSnapshot": "snapshot.mapped_ram",
    "MappedRamBlock": "snapshot.mapped_ram",
    "start_load": "snapshot.mapped_ram",
    "Sparse": "snapshot.save.writer",
}


def lazy_names(
    package: str, home: Mapping[str, str], names: dict[str, object]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose public names are imported on first use.

    home: the module of each of them, relative to the package.
    names: the package's ``globals()``.
    """

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f".{home[name]}", package), name)
        names[name] = value
        return value

    def list_names() -> list[str]:
        return sorted({*names, *home})

    return get, list_names


__getattr__, __dir__ = lazy_names(__name__, _HOME, globals())
