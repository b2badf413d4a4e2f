"""What QEMU says is where in the guest's address space: ``info mtree -f``."""

from __future__ import annotations

import re

from pyqmigrate.format.address_space.placement import Placement

__all__ = ["memory_seen"]

_LINE = re.compile(
    r"^ +(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) \(prio -?\d+, (?:ram|rom)\): "
    r"(?P<region>\S+?)(?: @(?P<offset>[0-9a-f]{16}))?(?: KVM)?$"
)


def memory_seen(text: str) -> tuple[Placement, ...]:
    """The ranges that show RAM or ROM, in order; what goes on in both worlds is one range.

    A region is named as in the device that has it: of a block's name what follows the last slash.
    """
    [view] = [view for view in text.split("FlatView #") if 'AS "memory"' in view]
    seen: list[Placement] = []
    for line in view.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        first, last = int(found["first"], 16), int(found["last"], 16)
        one = Placement(found["region"], first, int(found["offset"] or "0", 16), last + 1 - first)
        before = seen[-1] if seen else None
        if (
            before is not None
            and before.block == one.block
            and before.end == one.address
            and before.offset + before.length == one.offset
        ):
            seen[-1] = Placement(
                one.block, before.address, before.offset, before.length + one.length
            )
        else:
            seen.append(one)
    return tuple(seen)
