"""The disks of a command line, in every way to write one, and another image in their place."""

from __future__ import annotations

import json

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.disk_options import disk_options, with_image


def parse(*words: str) -> CommandLine:
    return CommandLine.parse(["qemu-system-x86_64", *words])


NODES = (
    "-blockdev",
    "driver=file,filename=/d,node-name=f",
    "-blockdev",
    '{"driver":"qcow2","file":"f","node-name":"n","cache":{"direct":true},"discard":"unmap"}',
    "-device",
    "virtio-blk-pci,drive=n,id=disk0",
)


@pytest.mark.parametrize(
    ("words", "names", "file", "form"),
    [
        (("-hda", "/d"), set(), "/d", None),
        (("/d",), set(), "/d", None),
        (("-drive", "file=/d,format=raw,if=virtio,id=x"), {"x"}, "/d", "raw"),
        (
            ("-drive", "file=/a,,b,if=none,id=x", "-device", "ide-hd,drive=x,id=y"),
            {"x", "y"},
            "/a,b",
            None,
        ),
        (("-drive", "driver=qcow2,file.driver=file,file.filename=/d,id=x"), {"x"}, "/d", "qcow2"),
        (("-drive", "file=nbd://host/x,format=raw,id=x"), {"x"}, None, "raw"),
        (("-drive", "file=file:/d,id=x"), {"x"}, "/d", None),
        (NODES, {"n", "disk0"}, "/d", "qcow2"),
        (
            (
                "-blockdev",
                '{"driver":"raw","node-name":"n","file":{"driver":"file","filename":"/d"}}',
                "-device",
                '{"driver":"scsi-hd","drive":"n"}',
            ),
            {"n"},
            "/d",
            "raw",
        ),
        (
            (
                "-blockdev",
                "driver=raw,node-name=r,file.driver=file,file.filename=/d",
                "-blockdev",
                "driver=throttle,file=r,node-name=t,throttle-group=g",
                "-device",
                "ide-hd,drive=t",
            ),
            {"r", "t"},
            "/d",
            "raw",
        ),
        (
            ("-blockdev", "driver=file,node-name=n,filename=/d", "-device", "ide-hd,drive=n"),
            {"n"},
            "/d",
            "file",
        ),
        (
            (
                "-blockdev",
                "driver=nbd,node-name=n,server.type=unix,server.path=/s",
                "-device",
                "ide-hd,drive=n",
            ),
            {"n"},
            None,
            "nbd",
        ),
    ],
)
def test_disk_is_found(
    words: tuple[str, ...], names: set[str], file: str | None, form: str | None
) -> None:
    (disk,) = disk_options(parse(*words))
    assert (set(disk.names), disk.file, disk.format) == (names, file, form)
    assert disk.writable and not disk.volatile


@pytest.mark.parametrize(
    ("words", "writable", "volatile"),
    [
        (("-drive", "file=/d,readonly=on"), False, False),
        (("-drive", "file=/d,media=cdrom"), False, False),
        (("-drive", "file=/d,snapshot=on"), True, True),
        (("-snapshot", "-hda", "/d"), True, True),
        (
            (
                "-blockdev",
                "driver=raw,node-name=n,file.filename=/d,file.driver=file,read-only=on",
                "-device",
                "ide-hd,drive=n",
            ),
            False,
            False,
        ),
    ],
)
def test_what_becomes_of_writes_is_seen(
    words: tuple[str, ...], writable: bool, volatile: bool
) -> None:
    (disk,) = disk_options(parse(*words))
    assert (disk.writable, disk.volatile) == (writable, volatile)


def replaced(*words: str) -> list[str]:
    command = parse(*words)
    (disk,) = disk_options(command)
    return with_image(command, disk, "/o,1.qcow2").argv()[1:]


def test_image_of_a_drive_is_replaced_and_the_rest_stays() -> None:
    (_, value) = replaced("-drive", "if=virtio,file=/d,format=raw,id=x,cache=none,file.locking=off")
    assert value == "file=/o,,1.qcow2,format=qcow2,if=virtio,id=x,cache=none,file.locking=off"
    (_, value) = replaced("-drive", "driver=raw,file.driver=file,file.filename=/d,id=x")
    assert value == "file=/o,,1.qcow2,format=qcow2,id=x"


def test_image_of_hda_is_replaced() -> None:
    assert replaced("-hda", "/d") == ["-hda", "/o,1.qcow2"]


def test_node_is_replaced_under_its_name() -> None:
    words = replaced(*NODES)
    assert words[:2] == list(NODES[:2]) and words[4:] == list(NODES[4:])
    assert json.loads(words[3]) == {
        "driver": "qcow2",
        "node-name": "n",
        "file": {"driver": "file", "filename": "/o,1.qcow2"},
        "cache": {"direct": True},
        "discard": "unmap",
    }


@pytest.mark.parametrize(
    "value", ["file=/d,format=raw,offset=512", "file=/d,encrypt.key-secret=s,format=qcow2"]
)
def test_image_that_is_more_than_its_name_is_not_replaced(value: str) -> None:
    with pytest.raises(UsageError, match="cannot be replaced"):
        replaced("-drive", value)
