"""A recorded command line, made fit for a new QEMU. tests/qemu starts some."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.spawn import QMP_CHARDEV
from pyqmigrate.vm.record.command import recorded_command, without_monitors
from pyqmigrate.vm.record.contents import Image, RecordedQemu, VmRecord
from tests.harness.vm_records import disk, record

MIB = 1 << 20
QEMU = "qemu-system-x86_64"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A record's file of our own."""
    (tmp_path / "record").write_text("")
    (tmp_path / "record").chmod(0o600)
    return tmp_path / "record"


def of(
    *words: str,
    binary: str = "",
    redacted: tuple[int, ...] = (),
    directory: str = "/",
    **parts: object,
) -> VmRecord:
    process = RecordedQemu("10.0.2", binary, (QEMU, *words), redacted, directory)
    return record(qemu=process, **{"disks": [], **parts})  # type: ignore[arg-type]


def options(path: Path, *words: str) -> list[str]:
    command, _ = recorded_command(of(*words), path)
    return command.argv()[1:]


def test_words_of_another_start_are_left_out(path: Path) -> None:
    words = ["-S", "-m", "64", "-incoming", "defer", "-loadvm", "x", "-daemonize", "-pidfile", "p"]
    assert options(path, *words) == ["-m", "64"]


def test_own_monitor_of_a_restore_is_left_out(path: Path) -> None:
    own, own_before = ["-readconfig", "/proc/self/fd/./7"], ["-readconfig", "/proc/self/fd/7"]
    asked_for = ["-chardev", f"socket,id={QMP_CHARDEV},path=/run/1.qmp,server=on,wait=off"]
    assert options(path, *own, "-m", "64") == ["-m", "64"]
    assert options(path, *own, "-m", "64", *asked_for) == ["-m", "64"]
    # A wrapper has put its own options before.
    assert options(path, "-L", "/bios", *own, "-m", "64") == ["-L", "/bios", "-m", "64"]
    assert options(path, "-m", "64", *own_before) == ["-m", "64"]
    assert options(path, "-m", "64", *own_before, *asked_for) == ["-m", "64"]
    with pytest.raises(UsageError, match="readconfig"):
        options(path, *own_before, "-m", "64")


def test_monitors_of_one_guest_are_left_out_for_several() -> None:
    """With the character devices that only they use."""
    kept = [
        "-chardev",
        "socket,id=b,path=/run/b,server=on",
        "-serial",
        "chardev:b",
        "-chardev",
        "socket,id=aa,path=/run/aa",
        "-device",
        "virtserialport,chardev=aa",
        "-object",
        "iothread,id=a",
    ]
    left_out = [
        "-qmp",
        "unix:/run/q,server=on",
        "-qmp-pretty",
        "stdio",
        "-monitor",
        "stdio",
        "-chardev",
        "socket,id=a,path=/run/a,server=on",
        "-mon",
        "chardev=a,mode=control",
        "-mon",
        "b",
        "-chardev",
        '{"backend":"null","id":"c"}',
        "-object",
        '{"qom-type":"monitor-qmp","id":"m","chardev":"c"}',
    ]
    command, notes = without_monitors(CommandLine.parse([QEMU, *left_out, *kept]))
    assert command.argv()[1:] == [*kept, "-monitor", "none"]
    assert len(notes) == len(left_out) // 2
    for words in (kept, ["-monitor", "none"]):
        command, notes = without_monitors(CommandLine.parse([QEMU, *words]))
        assert (command.argv()[1:], notes) == (words, [])


def test_program_is_named_by_its_path(path: Path, tmp_path: Path) -> None:
    binary = tmp_path / QEMU
    binary.touch(0o755)
    command, _ = recorded_command(of("-m", "64", binary=str(binary)), path)
    assert command.program == str(binary)
    with pytest.raises(UsageError, match="cannot be run here"):
        recorded_command(of("-m", "64", binary=str(tmp_path / "x" / QEMU)), path)


def test_program_that_is_not_qemu_is_not_run(path: Path) -> None:
    given = of(binary=sys.executable)
    given = given._replace(qemu=given.qemu._replace(command=("/bin/sh", "-c", "touch /tmp/x")))
    with pytest.raises(UsageError, match="does not look like a QEMU"):
        recorded_command(given, path)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_record_that_others_may_write_is_not_run(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(UsageError, match="another user"):
        options(path, "-m", "64")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_record_of_another_user_is_not_run(path: Path) -> None:
    os.chown(path, 12345, 12345)
    with pytest.raises(UsageError, match="another user"):
        options(path, "-m", "64")


def test_missing_command_line_and_missing_secret_are_named(path: Path) -> None:
    with pytest.raises(UsageError, match="no command line: give the whole"):
        recorded_command(record(command=None), path)
    secret = of("-object", "secret,id=s,data=<redacted>", redacted=(2,))
    with pytest.raises(UsageError, match=r"-object secret,id=s,data=<redacted>\)"):
        recorded_command(secret, path)


def test_directory_that_is_gone_is_refused(path: Path, tmp_path: Path) -> None:
    command, _ = recorded_command(of("-m", "64", directory=str(tmp_path)), path)
    assert command.directory == str(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        recorded_command(of("-m", "64", directory=str(tmp_path / "gone")), path)


@pytest.mark.parametrize(
    "words",
    [
        ("-add-fd", "fd=5,set=1"),
        ("-netdev", "tap,id=n,fd=5"),
        ("-netdev", "tap,id=n,fds=5:6,vhostfds=7:8"),
        ("-netdev", '{"type":"tap","id":"n","vhostfd":"7"}'),
        ("-chardev", "socket,id=m,fd=36,server=on,wait=off"),
        ("-readconfig", "/dev/fd/63"),
        ("-drive", "file=/dev/fdset/1,format=raw"),
        ("-drive", "file=/proc/self/fd/5,format=raw,if=virtio"),
        ("-netdev", '{"type":"stream","id":"n","addr":{"type":"fd","str":"5"}}'),
    ],
)
def test_descriptor_is_refused_by_its_word(path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="descriptor that QEMU inherited") as caught:
        options(path, "-m", "64", *words)
    assert " ".join(words) in str(caught.value)


def test_name_that_looks_like_a_descriptor_is_none(path: Path) -> None:
    words = ["-name", "guest=fd=5", "-drive", "file=/images/fd.img,format=raw", "-append", "fd=3"]
    assert options(path, *words) == words


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (
            "memory-backend-file,id=ram,size=64M,share=on,mem-path=/proc/self/fd/5",
            "memory-backend-memfd,id=ram,size=64M,share=on",
        ),
        (
            "memory-backend-file,size=64M,mem-path=/proc/self/fd/5,id=ram,host-nodes=0,host-nodes=1,"
            "policy=bind,readonly=on,rom=off,offset=4096",
            "memory-backend-ram,size=64M,id=ram,host-nodes=0,host-nodes=1,policy=bind",
        ),
    ],
)
def test_memory_of_a_descriptor_is_made_anew(path: Path, given: str, made: str) -> None:
    assert options(path, "-object", given) == ["-object", made]


def test_memory_that_a_restore_mapped_is_made_anew(path: Path) -> None:
    given = {
        "qom-type": "memory-backend-file",
        "id": "pc.ram",
        "size": 64 * MIB,
        "rom": "off",
        "mem-path": "/proc/self/fd/5",
        "offset": 1 * MIB,
        "readonly": True,
        "x-use-canonical-path-for-ramblock-id": False,
    }
    (_, text) = options(path, "-object", json.dumps(given))
    assert json.loads(text) == {
        "qom-type": "memory-backend-ram",
        "id": "pc.ram",
        "size": 64 * MIB,
        "x-use-canonical-path-for-ramblock-id": False,
    }


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["-drive", "file={base},format=raw,if=none,id=d"], "file={over}"),
        (
            [
                "-blockdev",
                "driver=file,filename={base},node-name=f",
                "-blockdev",
                "driver=raw,file=f,node-name=n",
                "-device",
                "virtio-blk-pci,drive=n,id=d0",
            ],
            '"filename": "{over}"',
        ),
    ],
)
def test_disk_that_got_another_file_later_has_that(
    path: Path, tmp_path: Path, words: list[str], made: str
) -> None:
    base, over = tmp_path / "base", tmp_path / "base.a.qcow2"
    over.touch()
    images = (Image(str(over), "qcow2", 8 * MIB, None), Image(str(base), "raw", 8 * MIB, None))
    words = [word.replace("{base}", str(base)) for word in words]
    command, _ = recorded_command(of(*words, disks=[disk(images=images)]), path)
    assert any(made.replace("{over}", str(over)) in word for word in command.argv())
    assert CommandLine.parse(command.argv()).options == command.options
