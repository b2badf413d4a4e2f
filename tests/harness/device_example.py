"""A device description with every kind of field, and a body for it."""

from __future__ import annotations

import struct

__all__ = ["BODY", "RTC"]

RTC = {
    "vmsd_name": "rtc",
    "version": 1,
    "fields": [
        {"name": "cmos", "type": "buffer", "size": 128},
        {"name": "due", "type": "timer", "size": 8},
        {"name": "on", "type": "bool", "size": 1},
        {
            "name": "irq",
            "type": "struct",
            "size": 3,
            "array_len": 2,
            "struct": {
                "vmsd_name": "irq",
                "version": 1,
                "fields": [
                    {"name": "level", "type": "uint8", "size": 1},
                    {"name": "count", "type": "uint16", "size": 2},
                ],
            },
        },
    ],
    "subsections": [
        {
            "vmsd_name": "rtc/more",
            "version": 2,
            "fields": [{"name": "own", "type": "virtio", "size": 2}],
        }
    ],
}


BODY = (
    bytes(range(128))
    + struct.pack(">qBBHBH", -1, 1, 2, 0x300, 4, 5)
    + b"\x05\x08rtc/more"
    + struct.pack(">I", 2)
    + b"\xab\xcd"
)
