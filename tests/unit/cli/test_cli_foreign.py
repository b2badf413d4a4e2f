"""Files of other kinds are named, with what to do."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pyqmigrate import NotSupported, SnapshotError, devices, open_snapshot, seal
from pyqmigrate.format.foreign import recognize
from tests.harness.command import Command
from tests.harness.stream_builders import Sparse


def qcow2(*states: tuple[str, int]) -> bytes:
    """A header and its table of snapshots, each a name and the bytes of its guest's state."""
    table = b""
    for number, (name, size) in enumerate(states):
        ident = str(number).encode()
        entry = struct.pack(">QIHHIIQIIQQ", 0, 0, len(ident), len(name), 0, 0, 0, 0, 16, size, 0)
        entry += ident + name.encode()
        table += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    head = b"QFI\xfb" + struct.pack(
        ">IQIIQIIQQIIQ", 3, 0, 0, 16, 1 << 30, 0, 0, 0, 0, 0, len(states), 4096
    )
    return head.ljust(4096, b"\0") + table


def elf(kind: int) -> bytes:
    return b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<H", kind)


KINDS = {
    "qcow2 disk": (qcow2(), "a qcow2 disk image without", "vm save"),
    "qcow2 with savevm": (qcow2(("plain", 0), ("work", 5 << 32)), "savevm: 'work'", "-loadvm work"),
    "elf core": (elf(4), "an ELF core", "gdb"),
    "program": (elf(2), "an ELF program", "save"),
    "lime": (b"EMiL" + bytes(28), "a LiME memory image", "volatility3"),
    "kdump": (b"KDUMP   " + bytes(90), "a kdump file", "crash"),
    "flattened kdump": (b"makedumpfile\0" + bytes(90), "flattened", "crash"),
    "windows dump": (b"PAGEDU64" + bytes(90), "a Windows crash dump", "volatility3"),
    "vmss": (b"\xd2\xbe\xd2\xbe" + bytes(90), "a saved state of VMware", "vmem"),
    "vmsn": (b"\xd1\xba\xd1\xba" + bytes(90), "a saved state of VMware", "vmem"),
    "vmdk": (b"KDMV" + bytes(508), "a VMware disk", "vm save"),
    "vhdx": (b"vhdxfile" + bytes(90), "a VHDX disk", "vm save"),
    "vdi": (
        b"<<< QEMU VM Virtual Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe",
        "a VirtualBox disk",
        "vm save",
    ),
    "luks": (b"LUKS\xba\xbe" + bytes(90), "a LUKS encrypted disk", "vm save"),
    "boot sector": (bytes(510) + b"\x55\xaa", "a raw disk image", "vm save"),
    "gpt": (bytes(512) + b"EFI PART", "a raw disk image", "vm save"),
    "ext4": (bytes(1080) + b"\x53\xef" + bytes(99), "a file system", "vm save"),
    "xen": (b"LibxlFmt" + bytes(90), "Xen", "the program that wrote it"),
    "firecracker": (b"\0\0\x64\x86\x84\x19\x10\x07" + bytes(90), "Firecracker", "wrote it"),
    "seal": (b'{"format": "pyqmigrate-seal", "version": 1', "the seal of a snapshot", ".seal"),
    "index": (b"qmindex2" + bytes(90), "the index of a snapshot", "--index"),
    "tar": (b"name".ljust(257, b"\0") + b"ustar", "a tar archive", "Unpack"),
    "zip": (b"PK\x03\x04" + bytes(90), "a zip archive", "Unpack"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(90), "compressed (lz4)", "lz4 -dc"),
    "lzop": (b"\x89LZO\0\r\n\x1a\n" + bytes(90), "compressed (lzop)", "lzop -dc"),
}


@pytest.fixture(params=KINDS)
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str]:
    data, what, advice = KINDS[request.param]
    path = tmp_path / "given"
    path.write_bytes(data)
    return path, what, advice


@pytest.mark.usefixtures("same_descriptors")
def test_every_reader_names_the_kind_and_the_way_on(foreign: tuple[Path, str, str]) -> None:
    path, what, advice = foreign
    for reader in (open_snapshot, devices, seal):
        with pytest.raises(NotSupported) as caught:
            reader(path)
        assert what in str(caught.value), reader
        assert advice in str(caught.value), reader


def test_every_verb_names_the_kind(
    foreign: tuple[Path, str, str], tmp_path: Path, command: Command
) -> None:
    path, what, _ = foreign
    to = tmp_path / "to"
    conversions = [["convert", to, "--to", form] for form in ("mapped-ram", "stream", "elf")]
    for words in (["info"], ["verify"], ["devices"], ["seal"], ["unpack", to], *conversions):
        ran = command(words[0], path, *words[1:])
        assert ran.code == 5, (words, ran)
        assert what in ran.err, words
        assert not to.exists()


def test_unknown_bytes_stay_a_damaged_snapshot(tmp_path: Path) -> None:
    for data in (b"", b"NOPE", bytes(9000), b"\xff" * 9000):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(SnapshotError):
            open_snapshot(tmp_path / "x")


@pytest.mark.parametrize("at", range(56, 110))
def test_damaged_qcow2_is_named_all_the_same(at: int) -> None:
    data = bytearray(qcow2(("work", 4096)).ljust(5000, b"\0"))
    data[at] ^= 0xFF
    assert "qcow2" in str(recognize(Sparse([(0, bytes(data))], None)))


def test_own_exports_are_recognized(snapshot: Path, tmp_path: Path, command: Command) -> None:
    for form, what in (("elf", "an ELF core"), ("lime", "a LiME memory image")):
        out = tmp_path / form
        assert command("convert", snapshot, out, "--to", form, "--map", "pc.ram@0").code == 0
        with pytest.raises(NotSupported, match=what):
            open_snapshot(out)


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_disk_of_qemu_img_is_recognized(tmp_path: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "d", "1G"], check=True)
    subprocess.run(["qemu-img", "snapshot", "-c", "empty", tmp_path / "d"], check=True)
    with pytest.raises(NotSupported, match="qcow2 disk image without"):
        open_snapshot(tmp_path / "d")
