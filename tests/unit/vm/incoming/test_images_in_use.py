"""Disk images of a command line that another process writes to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.incoming.images_in_use import refuse_in_use
from pyqmigrate.vm.qemu.command_line import CommandLine

HOLD = "import sys; file = open(sys.argv[1], sys.argv[2]); print(flush=True); sys.stdin.read()"


def check(text: str) -> None:
    refuse_in_use(CommandLine.parse(["qemu-system-x86_64", *shlex.split(text)]))


@contextlib.contextmanager
def locked(path: Path, byte: int) -> Iterator[None]:
    """Lock a byte as QEMU does for an open image."""
    with path.open("r+b") as file:
        lock = struct.pack("@hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(file, 37, lock)  # F_OFD_SETLK
        yield


@contextlib.contextmanager
def opened(path: Path, mode: str) -> Iterator[int]:
    """Open the file in another process, without a lock; yield its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate()


def image(path: Path, backing: str = "") -> Path:
    """Create a file; with ``backing`` the start of a qcow2 over that."""
    name = os.fsencode(backing)
    head = struct.pack(">4sIQI", b"QFI\xfb", 3, 512, len(name)).ljust(512, b"\0") + name
    path.write_bytes(head if backing else bytes(1024))
    return path


FORMS = [
    "-drive file={0},format=raw,if=virtio",
    "-hda {0}",
    "{0}",
    "-pflash {0}",
    "-drive if=none,id=d,file.filename={0},file.driver=file,driver=raw",
    "-blockdev driver=file,filename={0},node-name=d",
    '-blockdev \'{{"driver":"raw","node-name":"d","file":{{"driver":"file","filename":"{0}"}}}}\'',
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("byte", [101, 201])  # the process writes; it does not share writing
def test_image_that_another_qemu_has_locked_is_refused(
    tmp_path: Path, form: str, byte: int
) -> None:
    path = image(tmp_path / "disk")
    check(form.format(path))
    with locked(path, byte), pytest.raises(UsageError, match=f"'{path}' is open for writing"):
        check(form.format(path))
    check(form.format(path))


def test_image_that_a_process_writes_without_a_lock_is_refused(tmp_path: Path) -> None:
    path = image(tmp_path / "disk")
    with (
        opened(path, "r+b") as pid,
        pytest.raises(UsageError, match=rf"in process {pid} \(.*\) \(-hda .*: end that process"),
    ):
        check(f"-hda {path}")


def test_image_of_a_configuration_file_is_refused_too(tmp_path: Path) -> None:
    path, configuration = image(tmp_path / "disk"), tmp_path / "vm.cfg"
    configuration.write_text(f'[drive "d"]\n  file = "{path}"\n  if = "none"\n')
    with locked(path, 101), pytest.raises(UsageError, match=f"-readconfig {configuration}: drive"):
        check(f"-readconfig {configuration}")


@pytest.mark.parametrize(
    "option",
    [
        "-drive file={0},readonly=on",
        "-drive file={0},snapshot=on",
        "-snapshot -hda {0}",
        "-blockdev driver=file,filename={0},node-name=d,read-only=on",
        "-cdrom {0}",
    ],
)
def test_image_that_is_not_written_to_is_not_looked_at(tmp_path: Path, option: str) -> None:
    path = image(tmp_path / "disk")
    with locked(path, 101), opened(path, "r+b"):
        check(option.format(path))


def test_image_that_others_read_is_taken(tmp_path: Path) -> None:
    path = image(tmp_path / "disk")
    with locked(path, 100), opened(path, "rb"):
        check(f"-hda {path}")


def test_backing_file_that_is_shared_for_reading_is_fine(tmp_path: Path) -> None:
    base = image(tmp_path / "base")
    overlay = image(tmp_path / "overlay", "base")
    with locked(base, 100), locked(base, 201), opened(base, "rb"):
        check(f"-hda {overlay}")


@pytest.mark.parametrize("name", ["base", "{0}", "file:{0}"])
def test_backing_file_that_another_guest_writes_is_refused(tmp_path: Path, name: str) -> None:
    base = image(tmp_path / "base")
    middle = image(tmp_path / "middle", name.format(base))
    overlay = image(tmp_path / "overlay", "middle")
    assert middle.exists()
    with (
        locked(base, 101),
        pytest.raises(UsageError, match=f"'{base}', a backing file of '{overlay}'"),
    ):
        check(f"-hda {overlay}")


def test_device_that_shares_its_disk_may_share_it(tmp_path: Path) -> None:
    path = image(tmp_path / "disk")
    with locked(path, 101), opened(path, "r+b"):
        check(f"-drive if=none,id=d,file={path} -device virtio-blk-pci,drive=d,share-rw=on")


def test_chain_without_an_end_and_what_is_not_a_file_are_left_to_qemu(tmp_path: Path) -> None:
    image(tmp_path / "a", "b")
    image(tmp_path / "b", "a")
    os.mkfifo(tmp_path / "pipe")
    for name in ("a", "pipe", "none"):
        check(f"-hda {tmp_path / name}")
    check("-drive file=nbd://localhost/x -drive file=/dev/fdset/3")
