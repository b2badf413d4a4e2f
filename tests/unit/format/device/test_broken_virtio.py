"""A virtio device that only the twin finds broken is described as the guest has it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyqmigrate.errors import NotSupported
from pyqmigrate.format.device.broken_virtio import without_broken
from pyqmigrate.format.device.described import check_described
from pyqmigrate.format.device.sections import DeviceSection, encode_devices

MARK = b"\x05\x0dvirtio/broken\0\0\0\1\1"


def sections(disk: bytes) -> bytes:
    devices = [
        DeviceSection("timer", b"12345"),
        DeviceSection("disk", disk),
        DeviceSection("net", b"123"),
    ]
    return encode_devices(devices, 4096)[0]


def described(size: int, kind: str = "virtio") -> bytes:
    def device(name: str, kind: str, size: int) -> dict[str, Any]:
        return {
            "name": name,
            "instance_id": 0,
            "vmsd_name": name,
            "version": 0,
            "fields": [{"name": "f", "type": kind, "size": size}],
        }

    devices = [device("timer", "buffer", 5), device("disk", kind, size), device("net", "virtio", 3)]
    return json.dumps({"page_size": 4096, "devices": devices}).encode()


def test_mark_of_the_twin_is_left_out() -> None:
    ours, theirs = sections(b"queues"), sections(b"QUEUES" + MARK)
    alike, text = without_broken(ours, theirs, described(6 + len(MARK)))
    assert alike == sections(b"QUEUES")
    assert json.loads(text) == json.loads(described(6))
    check_described(ours, alike, json.loads(text))


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [
        (b"queues", b"QUEUES", "virtio"),
        (b"queues" + MARK, b"QUEUES" + MARK, "virtio"),  # the guest's own is broken, too
        (b"queues", b"QUEUE" + MARK, "virtio"),
        (b"queues" + MARK, b"QUEUES", "virtio"),
        (b"queues", b"QUEUES" + MARK, "buffer"),
        (b"queues", b"QUEUES" + MARK.replace(b"broken", b"frozen"), "virtio"),
    ],
    ids=["none", "both", "other-length", "ours-only", "other-field", "other-subsection"],
)
def test_all_else_stays(ours: bytes, theirs: bytes, kind: str) -> None:
    text = described(len(theirs), kind)
    assert without_broken(sections(ours), sections(theirs), text) == (sections(theirs), text)
    if len(ours) != len(theirs):
        with pytest.raises(NotSupported):
            check_described(sections(ours), sections(theirs), json.loads(text))
