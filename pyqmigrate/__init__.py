"""Save, restore and work with the memory of QEMU virtual machines at the speed of the disk.

The main job: guest memory into a file that QEMU loads (its ``mapped-ram`` format), and back::

    import pyqmigrate

    report = pyqmigrate.save("/snap/guest.mapped", [pyqmigrate.RamBlock("pc.ram", memory)])

    with pyqmigrate.Snapshot("/snap/guest.mapped") as snapshot:
        snapshot.load({"pc.ram": memory})

``memory`` is anything with the buffer protocol, or ``FileMemory(fd)``. Start reading at
:func:`save` and :class:`Snapshot`; :mod:`pyqmigrate.errors` shows what can go wrong.
"""

from pyqmigrate.classic import ClassicSnapshot
from pyqmigrate.devices import Devices, devices
from pyqmigrate.errors import (
    BlockMismatch,
    Cancelled,
    DirectIORefused,
    GuestMemoryError,
    JobTimeout,
    NoSpace,
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
from pyqmigrate.export.convert import Form, convert
from pyqmigrate.fdset import FdsetError, FdSets
from pyqmigrate.format.cpu_state import CpuRegisters, cpu_registers
from pyqmigrate.format.device_tree import Device
from pyqmigrate.format.devices import DeviceSection
from pyqmigrate.io.channels import Job, Progress
from pyqmigrate.io.memory import FileMemory, ProcessMemory, RamBlock
from pyqmigrate.io.target import Descriptors, DirectIO
from pyqmigrate.load import Clear, LoadReport
from pyqmigrate.migration import Guest, Migration
from pyqmigrate.opening import open_snapshot
from pyqmigrate.options import Capabilities, Parameters, Policy
from pyqmigrate.provenance import Provenance, provenance
from pyqmigrate.save import SaveReport, Sparse, save, start_save
from pyqmigrate.snapshot import Snapshot, SnapshotBlock, start_load

__all__ = [
    "save",
    "Snapshot",
    "open_snapshot",
    "convert",
    "RamBlock",
    "FileMemory",
    "ProcessMemory",
    "Descriptors",
    "start_save",
    "start_load",
    "Job",
    "Progress",
    "SaveReport",
    "LoadReport",
    "SnapshotBlock",
    "ClassicSnapshot",
    "Form",
    "devices",
    "Devices",
    "Device",
    "cpu_registers",
    "CpuRegisters",
    "provenance",
    "Provenance",
    "DirectIO",
    "Sparse",
    "Clear",
    "Migration",
    "Guest",
    "DeviceSection",
    "FdSets",
    "Capabilities",
    "Parameters",
    "Policy",
    "PyqmigrateError",
    "SnapshotError",
    "SnapshotTruncated",
    "UsageError",
    "BlockMismatch",
    "TargetError",
    "NoSpace",
    "DirectIORefused",
    "GuestMemoryError",
    "QemuError",
    "QemuRefused",
    "QemuGone",
    "NotSupported",
    "Cancelled",
    "JobTimeout",
    "FdsetError",
]
