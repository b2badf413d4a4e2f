"""What happened when during a save: phases, in lanes, for its report and a picture of it.

    with timeline.phase(Lane.QEMU, "device state"):
        ...
    timeline.watch(writer.channels, "write")     # from then on, each channel has a lane

Times are of ``time.monotonic()``, in seconds since the save began.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqmigrate.io.channels import Channels

__all__ = ["Lane", "Phase", "Timeline"]


class Lane(StrEnum):
    """Who does something; channels have lanes of their own, ``channel 1`` and so on."""

    GUEST = "guest"
    QEMU = "qemu"
    PAGES = "pages"  # of this process, where channels are not told apart
    FILE = "file"


@dataclass(frozen=True)
class Phase:
    """Something that took from ``begins`` to ``ends``, in seconds since the save began.

    ``lane`` is a :class:`Lane` or ``channel N``, ``pages`` how many pages of guest memory a channel
    went through.
    """

    lane: str
    name: str
    begins: float
    ends: float
    pages: int | None = None


class Timeline:
    """The phases of one save so far. All methods may be called by several threads."""

    def __init__(self, started_at: float) -> None:
        self._started_at = started_at
        self._phases: list[Phase] = []

    def add(
        self, lane: str, name: str, start: float, end: float, *, pages: int | None = None
    ) -> None:
        """Note a phase by its times of ``time.monotonic()``."""
        start, end = start - self._started_at, end - self._started_at
        self._phases.append(Phase(str(lane), name, start, end, pages))

    @contextlib.contextmanager
    def phase(self, lane: str, name: str) -> Iterator[None]:
        """Note what the block takes, also if it fails."""
        started_at = time.monotonic()
        try:
            yield
        finally:
            self.add(lane, name, started_at, time.monotonic())

    def watch(self, channels: Channels, name: str) -> None:
        """Note what each channel does from now on; replaces an earlier name."""

        def note(number: int, start: float, end: float, pages: int) -> None:
            self.add(f"channel {number + 1}", name, start, end, pages=pages)

        channels.observer = note

    def phases(
        self, pauses: Sequence[tuple[float, float | None]], *, runs_at_first: bool
    ) -> tuple[Phase, ...]:
        """Return all phases by their start; the guest's follow from its ``pauses``.

        pauses: start and end of each, in seconds since 1970; an end of None is not over.
        runs_at_first: whether the guest ran when the save began.
        """
        now = time.monotonic() - self._started_at
        zero = time.time() - now
        guest, since, runs = [], 0.0, runs_at_first
        for stop, resume in pauses:
            # A clock that was set in between makes times that are not possible.
            start = min(max(stop - zero, since), now)
            end = now if resume is None else min(max(resume - zero, start), now)
            if runs and start > since:
                guest.append(Phase(Lane.GUEST, "runs", since, start))
            guest.append(Phase(Lane.GUEST, "stopped", start, end))
            since, runs = end, resume is not None
        if since < now:
            guest.append(Phase(Lane.GUEST, "runs" if runs else "stopped", since, now))
        return tuple(sorted([*guest, *self._phases], key=lambda phase: (phase.begins, phase.ends)))
