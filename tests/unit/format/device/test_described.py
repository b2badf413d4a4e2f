"""A description is taken for other bytes only where it is true of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyqmigrate.errors import NotSupported
from pyqmigrate.format.device.described import check_described
from pyqmigrate.format.device.sections import DeviceSection, encode_devices

FIELDS = [{"name": "a", "type": "uint32", "size": 4}, {"name": "b", "type": "uint8", "size": 1}]
SUBSECTION = {
    "vmsd_name": "timer/more",
    "version": 1,
    "fields": [{"name": "c", "type": "uint8", "size": 1}],
}
FRAME = b"\x05\x0atimer/more\0\0\0\1"


def section(data: bytes, name: str = "timer", **more: Any) -> DeviceSection:
    return DeviceSection(name, data, **more)


def sections(*devices: DeviceSection) -> bytes:
    return encode_devices(devices, 4096)[0]


def description(*devices: dict[str, Any]) -> dict[str, Any]:
    return {"page_size": 4096, "devices": list(devices)}


TIMER = {"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, "fields": FIELDS}
PLAIN = sections(section(b"12345"))
MORE = sections(section(b"12345" + FRAME + b"x"))
WITH_MORE = {**TIMER, "subsections": [SUBSECTION]}


def test_other_values_are_described_as_well() -> None:
    check_described(PLAIN, sections(section(b"abcde")), description(TIMER))
    check_described(MORE, sections(section(b"abcde" + FRAME + b"y")), description(WITH_MORE))


@pytest.mark.parametrize(
    ("ours", "theirs", "described"),
    [
        (PLAIN, MORE, WITH_MORE),
        (MORE, PLAIN, TIMER),
        (PLAIN, sections(section(b"12345", version_id=3)), TIMER),
        (PLAIN, sections(section(b"12345", instance_id=1)), {**TIMER, "instance_id": 1}),
        (PLAIN, PLAIN + PLAIN, TIMER),
        (PLAIN + PLAIN, PLAIN, TIMER),
        (PLAIN, b"", TIMER),
        (PLAIN, PLAIN, {**TIMER, "name": "other"}),
        # As long, in another structure.
        (sections(section(b"12345" + b"\x05\x0atimer/else\0\0\0\1x")), MORE, WITH_MORE),
    ],
    ids=[
        "less",
        "more",
        "version",
        "instance",
        "fewer",
        "additional",
        "none",
        "not-described",
        "other-subsection",
    ],
)
def test_description_of_another_machine_is_refused(
    ours: bytes, theirs: bytes, described: dict[str, Any]
) -> None:
    with pytest.raises(NotSupported):
        check_described(ours, theirs, description(described))


def test_bytes_that_no_description_explains_are_alike_in_both() -> None:
    short = {**TIMER, "fields": FIELDS[:1]}
    check_described(PLAIN, sections(section(b"abcde")), description(short))


def test_footer_within_a_body_is_not_taken_for_its_end() -> None:
    trap = b"\x7e\0\0\0\2" + b"\x04\0\0\0\7\x05timer" + b"\0" * 8  # a footer, and what follows one
    fields = [{"name": "data", "type": "buffer", "size": len(trap)}]
    ours, other = sections(section(trap)), sections(section(bytes(len(trap))))
    check_described(ours, other, description({**TIMER, "fields": fields}))


def test_text_as_encode_devices_makes_it_fits_its_own_sections() -> None:
    made, text = encode_devices([section(b"1"), section(b"22", "rtc")], 4096)
    check_described(made, made, json.loads(text))
