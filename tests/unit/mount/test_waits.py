"""Which waits are reported."""

from __future__ import annotations

from dataclasses import replace

from pyqmigrate.mount.waits import LongWaits, Wait

WAIT = Wait(7, 12, "cat", "read", "guest", 4096, 512, 1.0)


def test_long_wait_is_reported_once() -> None:
    waits, long = LongWaits(), replace(WAIT, seconds=6.0)
    assert waits.new_messages([WAIT]) == []
    assert waits.new_messages([long]) == [
        "process 12 (cat) waits for guest at file offset 0x1000 since 6 s"
    ]
    assert waits.new_messages([replace(long, seconds=7.0)]) == []
    assert waits.new_messages([]) == []
    assert len(waits.new_messages([replace(long, pid=0, file="")])) == 1
