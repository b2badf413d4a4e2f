"""Files that are not migration streams, recognized by their content.

For a disk image or a core dump the user needs to know what it is and what to do with it, not which
bytes were expected. Numbers and offsets are those of the formats' own documents: QEMU's
``docs/interop/qcow2.rst``, the ELF gABI, LiME's and makedumpfile's headers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pyqmigrate.format.cursor import ByteSource
from pyqmigrate.format.seal import is_seal
from pyqmigrate.format.stream.wire import MAGIC

__all__ = ["Foreign", "recognize"]

_HEAD = 4096  # bytes that all magics are in
_ET_CORE = 4
_SNAPSHOTS_MAX = 64  # entries of a qcow2 snapshot table that are looked at
_ENTRY_MAX = 1 << 16  # bytes of one: strings of 64 KiB at most, and a few are enough

_ANALYZE = (
    "It has the memory of a guest and no device state, so no guest can be restored from it: "
    "open it with gdb, crash, drgn or volatility3"
)
_DISK = (
    "It has the guest's disk and not its memory: save the running guest with "
    "pyqmigrate vm save --qmp SOCKET SNAPSHOT"
)


@dataclass(frozen=True)
class Foreign:
    """A file of another kind: ``what`` it is, with its article, and ``advice``, a sentence."""

    what: str
    advice: str

    def __str__(self) -> str:
        return f"this is {self.what}, not a migration stream. {self.advice}"


_DISKS = (
    (b"QED\0", "a QED disk image"),
    (b"KDMV", "a VMware disk (VMDK)"),
    (b"# Disk DescriptorFile", "the descriptor of a VMware disk (VMDK)"),
    (b"conectix", "a VHD disk image"),
    (b"vhdxfile", "a VHDX disk image"),
    (b"LUKS\xba\xbe", "a LUKS encrypted disk"),
    (b"VMA\0", "a backup of Proxmox VE (VMA)"),
)
_DUMPS = (
    (b"EMiL", "a LiME memory image"),
    (b"KDUMP   ", "a kdump file (dump-guest-memory, makedumpfile)"),
    (b"DISKDUMP", "a diskdump file of a kernel"),
    (b"makedumpfile\0", "a kdump file in makedumpfile's flattened form"),
    (b"PAGEDUMP", "a Windows crash dump"),
    (b"PAGEDU64", "a Windows crash dump"),
)
_VMWARE = tuple(
    struct.pack("<I", magic) for magic in (0xBED2BED0, 0xBAD1BAD1, 0xBED2BED2, 0xBED3BED3)
)
_OTHERS = (
    (b"\x7fVirtualBox SavedState", "a saved state of VirtualBox"),
    (b"LibxlFmt", "a save of a Xen domain (xl)"),
    (b"Xen saved domain", "a save of a Xen domain (xl)"),
    (b"\0\0\x64\x86\x84\x19\x10\x07", "a snapshot of Firecracker"),
    (b"\0\0\xaa\xaa\x84\x19\x10\x07", "a snapshot of Firecracker"),
)
_ARCHIVES = ((b"PK\x03\x04", "a zip archive"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive"))
_OURS = ((b"qmindex", "the index of a snapshot", "Give the snapshot itself; this is for --index"),)


def recognize(source: ByteSource, offset: int = 0) -> Foreign | None:
    """Return the kind of the data at ``offset``; None for a stream or an unknown kind."""
    head = source.read_at(offset, _HEAD)
    if head.startswith(MAGIC):
        return None
    if head.startswith(b"QFI\xfb"):
        return _qcow2(source, offset, head)
    if head.startswith(b"\x7fELF"):
        return _elf(head)
    if is_seal(head):
        return Foreign("the seal of a snapshot", "Give the snapshot, the name without .seal")
    return _by_magic(head) or _disk_by_content(head)


def _by_magic(head: bytes) -> Foreign | None:
    for magic, what in _DISKS:
        if head.startswith(magic):
            return Foreign(what, _DISK)
    if head[64:68] == b"\x7f\x10\xda\xbe":
        return Foreign("a VirtualBox disk (VDI)", _DISK)
    for magic, what in _DUMPS:
        if head.startswith(magic):
            return Foreign(what, _ANALYZE)
    if head.startswith(_VMWARE):
        return Foreign(
            "a saved state of VMware (vmss, vmsn)",
            "Only VMware restores it. Its memory is in the .vmem file beside it: open both with "
            "volatility3, or convert them with VMware's vmss2core",
        )
    for magic, what in _OTHERS:
        if head.startswith(magic):
            return Foreign(what, "Only the program that wrote it restores it")
    for magic, what, advice in _OURS:
        if head.startswith(magic):
            return Foreign(what, advice)
    for magic, what in _ARCHIVES:
        if head.startswith(magic):
            return Foreign(what, "Unpack it, and give the snapshot that is in it")
    if head[257:262] == b"ustar":
        return Foreign("a tar archive", "Unpack it, and give the snapshot that is in it")
    return None


def _disk_by_content(head: bytes) -> Foreign | None:
    if head[512:520] == b"EFI PART":
        return Foreign("a raw disk image (with a GPT)", _DISK)
    if head[510:512] == b"\x55\xaa":
        return Foreign("a raw disk image (with a boot sector)", _DISK)
    if head[1080:1082] == b"\x53\xef":
        return Foreign("a file system (ext2, ext3 or ext4)", _DISK)
    if head.startswith(b"XFSB"):
        return Foreign("a file system (XFS)", _DISK)
    return None


def _elf(head: bytes) -> Foreign:
    big = head[5:6] == b"\x02"
    if int.from_bytes(head[16:18], "big" if big else "little") == _ET_CORE:
        return Foreign("an ELF core (dump-guest-memory, or convert --to elf)", _ANALYZE)
    return Foreign("an ELF program", "Give the file that the save wrote")


def _qcow2(source: ByteSource, offset: int, head: bytes) -> Foreign:
    names = _states(source, offset, head)
    if not names:
        return Foreign("a qcow2 disk image without the state of a guest", _DISK)
    count = len(names)
    listed = ", ".join(repr(name) for name in names[:4]) + (", ..." if count > 4 else "")
    return Foreign(
        f"a qcow2 disk image with the state of a guest in it (savevm: {listed})",
        f"Start QEMU with this disk and -loadvm {names[0]} -S, and save it from there with "
        "pyqmigrate vm save --qmp SOCKET SNAPSHOT",
    )


def _states(source: ByteSource, offset: int, head: bytes) -> list[str]:
    """Return the names of the snapshots in a qcow2 file that contain the state of a guest."""
    if len(head) < 72:
        return []
    count, position = struct.unpack_from(">IQ", head, 60)
    names = []
    for _ in range(min(count, _SNAPSHOTS_MAX)):
        entry = source.read_at(offset + position, _ENTRY_MAX) if position < 1 << 62 else b""
        if len(entry) < 40:
            break
        id_size, name_size = struct.unpack_from(">HH", entry, 12)
        state, extra = struct.unpack_from(">II", entry, 32)
        if extra >= 8 and len(entry) >= 48:
            state = struct.unpack_from(">Q", entry, 40)[0]
        start = 40 + extra + id_size
        if state and start + name_size <= len(entry):
            names.append(entry[start : start + name_size].decode("utf-8", "replace"))
        position += -(-(start + name_size) // 8) * 8
    return names
