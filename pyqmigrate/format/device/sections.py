"""Device sections that an embedding program passes in and gets back.

A section is a FULL element of the stream: the device's name, its instance and version, and bytes
that only the device understands (docs/internals/format.md, "Elements" and "Device sections"). The
JSON description after the stream gives their lengths. A device that does not describe its fields
gets the description that QEMU writes for devices of an older kind: one buffer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pyqmigrate.errors import UsageError
from pyqmigrate.format.stream.wire import FOOTER_TYPE, INSTANCE, SECTION_ID, SectionKind

__all__ = ["DeviceSection", "encode_devices", "global_state", "run_state_of"]

_FIRST_ID = 2  # 1 is RAM's
# Length of the run state with its NUL, run state, whether "suspended" is known, and whether it was.
_GLOBAL_STATE = struct.Struct(">I32sBB66x")


class DeviceSection(NamedTuple):
    """The state of one device.

    ``description`` is the ``fields`` (and ``subsections``) of its JSON description, as QEMU's
    vmstate has them; without one it is written as a single buffer.
    """

    name: str
    data: bytes
    instance_id: int = 0
    version_id: int = 1
    description: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        size = len(self.name.encode("utf-8", "surrogateescape"))
        if not 1 <= size <= 255:
            raise UsageError(f"device name {self.name!r} has {size} bytes; 1 to 255 are possible")
        for what, value in (("instance", self.instance_id), ("version", self.version_id)):
            if not 0 <= value < 1 << 32:
                raise UsageError(f"{what} {value} of device {self.name!r} does not fit 32 bits")


def encode_devices(devices: Sequence[DeviceSection], page_size: int) -> tuple[bytes, bytes]:
    """Return the encoded sections, in this order, and the JSON text that describes them."""
    parts: list[bytes] = []
    described: list[dict[str, Any]] = []
    for number, device in enumerate(devices, _FIRST_ID):
        name = device.name.encode("utf-8", "surrogateescape")
        parts += [
            SECTION_ID.pack(SectionKind.FULL.value, number),
            bytes([len(name)]),
            name,
            INSTANCE.pack(device.instance_id, device.version_id),
            device.data,
            SECTION_ID.pack(FOOTER_TYPE, number),
        ]
        size = len(device.data)
        body: Mapping[str, Any] = device.description or {
            "size": size,
            "fields": [{"name": "data", "size": size, "type": "buffer"}],
        }
        described.append({"name": device.name, "instance_id": device.instance_id, **body})
    text = json.dumps({"page_size": page_size, "devices": described})
    return b"".join(parts), text.encode()


def global_state(run_state: str) -> DeviceSection:
    """Return the section in which QEMU records the run state before the guest was stopped."""
    text = run_state.encode()
    return DeviceSection(
        "globalstate",
        _GLOBAL_STATE.pack(len(text) + 1, text, 1, 0),
        description={
            "vmsd_name": "globalstate",
            "version": 1,
            "fields": [
                {"name": "size", "type": "uint32", "size": 4},
                {"name": "runstate", "type": "buffer", "size": 32},
                {"name": "has_vm_was_suspended", "type": "uint8", "size": 1},
                {"name": "vm_was_suspended", "type": "uint8", "size": 1},
                {"name": "unused", "type": "buffer", "size": 66},
            ],
        },
    )


def run_state_of(devices: Sequence[DeviceSection]) -> str | None:
    """Return the run state that the sections record, or None."""
    for device in devices:
        if device.name == "globalstate" and len(device.data) >= _GLOBAL_STATE.size:
            text: bytes = _GLOBAL_STATE.unpack_from(device.data)[1]
            return text.split(b"\0", 1)[0].decode("ascii", "replace")
    return None
