"""Ranges of guest-physical addresses that show parts of RAM blocks, and layers of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["GivenPlacement", "Hole", "Placement", "overlay"]


@dataclass(frozen=True)
class Placement:
    """Bytes ``[offset, offset + length)`` of a block, mapped at guest-physical ``address``."""

    block: str
    address: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.address + self.length

    def part(self, start: int, end: int) -> Placement:
        """Return its part at the addresses ``[start, end)``, which are among its own."""
        return Placement(self.block, start, self.offset + start - self.address, end - start)


@dataclass(frozen=True)
class GivenPlacement:
    """A placement from the user; with ``length`` None it extends to the end of the block."""

    block: str
    address: int
    offset: int = 0
    length: int | None = None


class Hole(Placement):
    """Addresses without memory; a hole hides the layers below it."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__("", address, 0, length)

    def part(self, start: int, end: int) -> Placement:
        return Hole(start, end - start)


def overlay(layers: Iterable[Sequence[Placement]]) -> tuple[Placement, ...]:
    """Return the visible parts of stacked layers, the last one on top, in order of address.

    Neighbours that are contiguous, in the block too, are merged.
    """
    visible: list[Placement] = []
    for layer in layers:
        for top in layer:
            visible = [rest for below in visible for rest in _uncovered(below, top)]
            visible.append(top)
    visible.sort(key=lambda placement: placement.address)
    merged: list[Placement] = []
    for placement in visible:
        if isinstance(placement, Hole):
            continue
        last = merged[-1] if merged else None
        if last is not None and _is_contiguous(last, placement):
            merged[-1] = Placement(
                placement.block, last.address, last.offset, placement.end - last.address
            )
        else:
            merged.append(placement)
    return tuple(merged)


def _uncovered(below: Placement, top: Placement) -> Iterable[Placement]:
    if below.end <= top.address or top.end <= below.address:
        yield below
        return
    if below.address < top.address:
        yield below.part(below.address, top.address)
    if top.end < below.end:
        yield below.part(top.end, below.end)


def _is_contiguous(first: Placement, second: Placement) -> bool:
    return (
        first.block == second.block
        and first.end == second.address
        and first.offset + first.length == second.offset
    )
