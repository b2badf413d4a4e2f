"""The record of a save: bytes <-> values, and an untrusted file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import SnapshotError
from pyqmigrate.vm.record.contents import (
    VmRecord,
    decode_record,
    encode_record,
    is_record,
    read_record,
    record_path,
)
from tests.harness.vm_records import record


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    data = json.loads(encode_record(record()))
    change(data)
    return json.dumps(data).encode()


def test_what_is_written_is_read() -> None:
    assert decode_record(encode_record(record())) == record()


def test_words_that_are_not_text_come_back() -> None:
    words = ("qemu", os.fsdecode(b"file=/d\xff.img"))
    given = record(command=words)
    assert decode_record(encode_record(given)).command == words


def test_record_without_a_command_line_is_one() -> None:
    assert decode_record(encode_record(record(command=None))).command is None


def test_record_is_known_by_its_first_line() -> None:
    assert is_record(encode_record(record()))
    assert not is_record(b'{"format": "something else"}')


def test_unknown_keys_are_harmless() -> None:
    text = changed(lambda data: data.update(later={"a": 1}))
    assert decode_record(text) == record()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda data: data.update(version=2), "version 2"),
        (lambda data: data.update(format="other"), "not a record"),
        (lambda data: data.pop("cpus"), "record.cpus"),
        (lambda data: data["cpus"].update(number=-1), "record.cpus.number"),
        (lambda data: data["cpus"].update(number=1 << 64), "record.cpus.number"),
        (lambda data: data["cpus"].update(number=True), "record.cpus.number"),
        (lambda data: data["cpus"].update(topology={"core": "2"}), "record.cpus.topology.core"),
        (lambda data: data["qemu"].update(command="qemu"), "record.qemu.command"),
        (lambda data: data["qemu"]["command"].append(7), r"record.qemu.command\[\d+\]"),
        (lambda data: data["machine"].update(type=None), "record.machine.type"),
        (lambda data: data["machine"].update(type="pc\0"), "record.machine.type"),
        (lambda data: data["qemu"].update(directory="\ud800"), "record.qemu.directory"),
        (lambda data: data["disks"][0].update(images=[]), "record.disks"),
        (lambda data: data["disks"][0]["images"][0].pop("state"), r"images\[0\].state"),
        (lambda data: data.update(devices={}), "record.devices"),
        (lambda data: data.update(devices=[{"path": "", "type": ""}] * 70000), "record.devices"),
    ],
)
def test_record_that_is_not_one_is_refused(
    change: Callable[[dict[str, Any]], object], place: str
) -> None:
    with pytest.raises(SnapshotError, match=place):
        decode_record(changed(change))


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"[" * 100_000, b"1" * 100_000, b"nul"])
def test_text_that_is_not_a_record_is_refused(text: bytes) -> None:
    with pytest.raises(SnapshotError):
        decode_record(text)


def test_every_value_of_another_type_is_refused_and_nothing_else_happens() -> None:
    """Each leaf and each container in turn becomes something else."""
    original = json.loads(encode_record(record()))

    def places(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
        inner = (
            value.items()
            if isinstance(value, dict)
            else (enumerate(value) if isinstance(value, list) else ())
        )
        return [at, *(place for key, item in inner for place in places(item, (*at, key)))]

    for place in places(original)[1:]:
        for wrong in ({"x": []}, [[]], 1.5):
            data = json.loads(json.dumps(original))
            parent = data
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = wrong
            with pytest.raises(SnapshotError):
                decode_record(json.dumps(data).encode())


def test_record_lies_beside_its_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "guest.mapped"
    assert record_path(snapshot) == tmp_path / "guest.mapped.vm.json"
    assert record_path(f"file:{snapshot}") == record_path(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    assert record_path(tmp_path / "link") == record_path(snapshot)


def test_record_beside_a_snapshot_is_read(tmp_path: Path) -> None:
    assert read_record(tmp_path / "a") is None
    record_path(tmp_path / "a").write_bytes(encode_record(record()))
    found = read_record(tmp_path / "a")
    assert isinstance(found, VmRecord) and found == record()


@pytest.mark.parametrize("name", ["a" * 255, "\u00e4" * 127, "a" * 248])
def test_long_name_has_a_record_of_its_own(tmp_path: Path, name: str) -> None:
    path = record_path(tmp_path / name)
    path.write_bytes(encode_record(record()))
    assert path != record_path(tmp_path / f"{name[:-1]}b")
    assert read_record(tmp_path / name) == record()


@pytest.mark.parametrize("kind", ["fifo", "directory", "large"])
def test_file_that_cannot_be_a_record_is_not_read(tmp_path: Path, kind: str) -> None:
    path = record_path(tmp_path / "a")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(SnapshotError, match=r"a\.vm\.json"):
        read_record(tmp_path / "a")
