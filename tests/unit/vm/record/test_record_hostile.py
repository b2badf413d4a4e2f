"""Records with arbitrary content: a reader raises an error of the package, or goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.vm.incoming.overlays import with_overlays
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.record.command import recorded_command
from pyqmigrate.vm.record.compare import compare_command_line
from pyqmigrate.vm.record.contents import decode_record, encode_record
from pyqmigrate.vm.record.disk_check import check_disks
from tests.harness.vm_records import record

WORDS = [
    "qemu-system-x86_64",
    "-m",
    "64M",
    "-smp",
    "2",
    "-drive",
    "file=/images/disk,id=d,if=none",
    "-device",
    "virtio-blk-pci,drive=d,id=d0",
    "-object",
    "memory-backend-file,id=m,mem-path=/proc/self/fd/5,size=64M",
]
NASTY = {
    str: [
        "",
        "/",
        "-S",
        "-",
        "json:{",
        'json:{"file":[]}',
        "a:b",
        "\udcff",
        "x" * 5000,
        "{",
        "=",
        "qemu-system-x86_64",
        "/dev/zero",
        "/proc/self/mem",
        "file=,,",
        "../" * 300,
    ],
    int: [0, 1, (1 << 64) - 1],
    bool: [True, False],
    list: [[]],
    dict: [{}],
    type(None): [None],
}


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield at
    items = (
        value.items()
        if isinstance(value, dict)
        else (enumerate(value) if isinstance(value, list) else ())
    )
    for key, item in items:
        yield from places(item, (*at, key))


ORIGINAL = json.loads(encode_record(record(command=WORDS)))


@pytest.mark.parametrize("place", [*places(ORIGINAL)][1:], ids=str)
def test_any_value_in_any_place_is_borne(place: tuple[str | int, ...], tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.touch(0o600)
    given = CommandLine.parse(WORDS)
    parent = ORIGINAL
    for key in place[:-1]:
        parent = parent[key]
    for value in NASTY[type(parent[place[-1]])]:
        data = json.loads(json.dumps(ORIGINAL))
        target = data
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = value
        try:
            found = decode_record(json.dumps(data).encode())
            compare_command_line(given, found)
            pairs = check_disks(given, found, str(tmp_path / "s"), overlays=True).needs_overlay
            with_overlays(given, pairs, tmp_path, "s", "")
            recorded_command(found, path)
        except PyqmigrateError:
            continue
