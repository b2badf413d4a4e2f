"""What devices says about the device state in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import UsageError, open_snapshot
from pyqmigrate.format.device.sections import DeviceSection, encode_devices
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.writer import encode_head, encode_tail
from pyqmigrate.snapshot.devices import devices as look_into
from tests.harness.command import Command
from tests.harness.device_example import BODY, RTC
from tests.harness.stream_builders import (
    EOF,
    file_of,
    full,
    page_records,
    sequential_stream,
    snapshot,
)


def write(path: Path, *devices: DeviceSection) -> Path:
    """A snapshot with these devices; their section ids count from 2."""
    sections, text = encode_devices(devices, 4096)
    made = snapshot(sections=sections, description=text)
    path.write_bytes(made.read_at(0, made.size))
    return path


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    rtc = DeviceSection("rtc", BODY, 0, 3, RTC)
    return write(tmp_path / "s", rtc, DeviceSection("old", b"abc"), DeviceSection("old", b"d", 1))


def test_tree_shows_names_types_and_values(devices: Path, command: Command) -> None:
    lines = [line.split() for line in command("devices", devices, "rtc").out.splitlines()]
    assert lines[0][:6] == ["section", "2:", "rtc,", "instance", "0,", "version"]
    assert lines[1][:4] == ["cmos", "buffer", "00", "01"]
    assert lines[1][-3:] == ["...", "128", "bytes"]
    assert lines[2:] == [
        ["due", "timer", "-1"],
        ["on", "bool", "yes"],
        ["irq", "struct[2]"],
        ["[0]", "level", "2", "count", "0x300"],
        ["[1]", "level", "4", "count", "5"],
        ["subsection", "rtc/more,", "version", "2"],
        ["own", "virtio", "ab", "cd"],
    ]


def test_json_has_every_documented_key(devices: Path, command: Command) -> None:
    found = command("devices", devices, "--json").json
    assert set(found) == {"schema", "snapshot", "machine", "described", "opaque_tail", "devices"}
    assert (found["machine"], found["described"], found["opaque_tail"]) == ("pc", True, False)
    rtc, *others = found["devices"]
    assert set(rtc) == {
        "name",
        "instance_id",
        "version_id",
        "section_id",
        "offset",
        "length",
        "body_offset",
        "body_length",
        "described",
        "explained",
        "state",
    }
    assert rtc["body_length"] == len(BODY)
    assert [(d["name"], d["instance_id"], d["section_id"]) for d in others] == [
        ("old", 0, 3),
        ("old", 1, 4),
    ]
    with devices.open("rb") as file:
        file.seek(rtc["body_offset"])
        assert file.read(len(BODY)) == BODY


def test_json_values_are_whole(devices: Path, command: Command) -> None:
    state: dict[str, Any] = command("devices", devices, "rtc", "--json").json["devices"][0]["state"]
    cmos, due, on, irq = state["fields"]
    assert cmos["value"] == bytes(range(128)).hex()
    assert due == {
        "name": "due",
        "type": "timer",
        "offset": 128,
        "length": 8,
        "index": None,
        "opaque": False,
        "value": -1,
    }
    assert on["value"] is True
    assert [field["value"] for field in irq["value"][1]["fields"]] == [4, 5]
    [own] = state["subsections"][0]["fields"]
    assert (own["value"], own["opaque"]) == ("abcd", True)


def test_section_chooses_one_of_the_same_name(devices: Path, command: Command) -> None:
    [found] = command("devices", devices, "old", "--section", "4", "--json").json["devices"]
    assert found["instance_id"] == 1


def test_device_that_is_not_there_is_wrong_usage(devices: Path, command: Command) -> None:
    ran = command("devices", devices, "cpu")
    assert ran.code == 2
    assert "2 'rtc', 3 'old', 4 'old'" in ran.err


def test_bytes_that_the_description_does_not_explain_are_said(
    tmp_path: Path, command: Command
) -> None:
    longer = {**RTC, "fields": [{"name": "cmos", "type": "buffer", "size": 200}]}
    path = write(tmp_path / "s", DeviceSection("rtc", BODY, 0, 1, longer))
    out = command("devices", path).out.splitlines()
    assert out[1].strip() == "the description does not cover all of it"
    assert out[2].split()[:2] == ["?", "unexplained"]
    assert out[2].endswith(f"... {len(BODY)} bytes")


def test_sections_without_description_are_listed(tmp_path: Path, command: Command) -> None:
    made = snapshot(sections=full(3, "rtc", b"abc") + full(4, "cpu", b"de"), description=None)
    (tmp_path / "s").write_bytes(made.read_at(0, made.size))
    found = command("devices", tmp_path / "s", "--json").json
    assert found["described"] is False
    assert [d["state"]["fields"][0]["value"] for d in found["devices"]] == ["616263", "6465"]


def test_description_is_asked_for_where_there_is_none(tmp_path: Path, command: Command) -> None:
    sections, text = encode_devices([DeviceSection("rtc", b"abc")], 4096)  # lengths alone
    made = file_of(
        encode_head("pc", [BlockSpec("pc.ram", 65536)]),
        encode_tail(sections=sections, description=text),
    )
    (tmp_path / "s").write_bytes(made.read_at(0, made.size))
    ran = command("devices", tmp_path / "s")
    assert "--describe" in ran.out
    assert command("devices", tmp_path / "s", "--json").json["described"] is False
    ran = command("devices", tmp_path / "s", "--describe")
    assert (ran.code, "s.vm.json" in ran.err) == (2, True)
    ran = command("convert", tmp_path / "s", tmp_path / "t", "--to", "stream", "--describe")
    assert (ran.code, "s.vm.json" in ran.err) == (2, True)
    ran = command("devices", tmp_path / "s", "--describe", "--", "/no/qemu-system-x86_64")
    assert ran.code == 5
    assert not (tmp_path / "t").exists()


def test_two_dashes_end_the_options_where_nothing_is_described(
    devices: Path, command: Command
) -> None:
    ran = command("devices", "--json", "--", devices)
    assert ran.json["described"] is True


def test_device_state_alone_is_opened_by_looking(tmp_path: Path, command: Command) -> None:
    (tmp_path / "s").write_bytes(b"QEVM\0\0\0\3" + full(3, "rtc", b"abc") + EOF)
    found = command("devices", tmp_path / "s", "--json").json
    assert found["machine"] is None
    assert [device["name"] for device in found["devices"]] == ["rtc"]


@pytest.mark.parametrize("sequential", [False, True])
def test_devices_behind_libvirts_header_are_found(
    tmp_path: Path, command: Command, sequential: bool
) -> None:
    body, front = full(3, "rtc", b"abc"), 5000
    if sequential:
        data = sequential_stream(page_records(), devices=body)
    else:
        made = file_of(
            encode_head("pc", [BlockSpec("pc.ram", 65536)], offset=front),
            encode_tail(sections=body),
            bytes(front),
        )
        data = made.read_at(front, made.size - front)
    form = ImageFormat.RAW if sequential else ImageFormat.SPARSE
    header = encode_header(LibvirtHeader(True, 2, form, True, "<domain/>", "", front, "little"))
    (tmp_path / "s").write_bytes(header + data)
    for arguments in ([], ["--offset", "5000"]):
        ran = command("devices", tmp_path / "s", "rtc", "--json", *arguments)
        [found] = ran.json["devices"]
        assert (found["offset"] > front, found["body_length"]) == (True, 3)


def test_devices_of_a_sequential_stream_keep_its_index(tmp_path: Path, command: Command) -> None:
    (tmp_path / "s").write_bytes(sequential_stream(page_records(), devices=full(3, "rtc", b"abc")))
    assert command("devices", tmp_path / "s", "--index", tmp_path / "index").code == 0
    kept = (tmp_path / "index").stat()
    with open_snapshot(tmp_path / "s", index=tmp_path / "index") as snapshot:
        assert [device.name for device in look_into(snapshot).devices] == ["rtc"]
        assert snapshot.blocks["pc.ram"].read(0, 4) == b"\1\1\1\1"
        with pytest.raises(UsageError, match="opening"):
            look_into(snapshot, offset=0)
    assert (tmp_path / "index").stat().st_mtime_ns == kept.st_mtime_ns
    assert command("devices", tmp_path / "s", "--index", tmp_path / "s").code == 2


def test_sequential_stream_of_other_pages_needs_their_size(
    tmp_path: Path, command: Command
) -> None:
    records = page_records(1024)
    stream = sequential_stream(records, devices=full(3, "rtc", b"abc"), description=None)
    (tmp_path / "s").write_bytes(stream)
    assert command("devices", tmp_path / "s").code == 1
    assert command("devices", tmp_path / "s", "--page-size", "1024").code == 0


def test_snapshot_without_devices_says_so(tmp_path: Path, command: Command) -> None:
    (tmp_path / "s").write_bytes(sequential_stream(page_records()))
    assert command("devices", tmp_path / "s").out == "no device state\n"


def test_hostile_names_are_shown_escaped(tmp_path: Path, command: Command) -> None:
    bad = "\x1b[2J\u202e"
    described = {
        "fields": [
            {"name": bad, "type": bad, "size": 1},
            {
                "name": "s",
                "type": "struct",
                "size": 2,
                "array_len": 1,
                "struct": {"fields": [{"name": bad, "type": "uint8", "size": 2}]},
            },
        ]
    }
    path = write(tmp_path / "s", DeviceSection(bad, b"abc", 0, 1, described))
    out = command("devices", path).out
    assert r"\x1b[2J\u202e" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_file_that_is_not_a_snapshot_is_bad(tmp_path: Path, command: Command) -> None:
    (tmp_path / "s").write_bytes(b"hello, this is not a stream")
    assert command("devices", tmp_path / "s").code == 1


def test_section_that_is_not_a_number_is_wrong_usage(devices: Path, command: Command) -> None:
    assert command("devices", devices, "--section", "two").code == 2
