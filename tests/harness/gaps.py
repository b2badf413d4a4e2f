"""The pauses of a writing guest, measured from outside every 0.1 ms.

with GapRecorder(guest) as gaps:
    save(guest.socket, path)
print(gaps.longest, gaps.rate)
"""

from __future__ import annotations

import functools
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.harness.writing_guest import PAGE, Instant, WritingGuest

__all__ = ["Gap", "GapRecorder"]

_RECORD = struct.Struct("<ddddQQ")


@dataclass(frozen=True)
class Gap:
    """A time without progress: at least ``seconds`` long, at most ``at_most``.

    The bounds are apart where the recorder itself was not run by its busy host. ``started_at`` is
    of time.monotonic(), ``position`` what the guest had written.
    """

    seconds: float
    at_most: float
    started_at: float
    position: Instant


class GapRecorder:
    """Watches the progress of a guest while the block runs; then its results can be read.

    Gaps that may be longer than ``shortest`` seconds are kept, in order of time.
    """

    def __init__(self, guest: WritingGuest, shortest: float = 0.001) -> None:
        self._guest, self._shortest = guest, shortest
        self.gaps: list[Gap] = []
        self.rate = 0.0  # bytes a second that the guest wrote in this time

    def __enter__(self) -> Self:
        self._output = tempfile.TemporaryFile()
        address = hex(self._guest.progress_address)
        self._poller = subprocess.Popen(
            [_program(), f"{self._guest.pid}", address, f"{self._shortest * 1000}"],
            stdin=subprocess.PIPE,
            stdout=self._output,
        )
        self._guest._wait(lambda: self._output.seek(0, 2) >= _RECORD.size, 10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._poller.stdin is not None
        self._poller.stdin.close()
        code = self._poller.wait()
        with self._output as output:
            output.seek(0)
            records = list(_RECORD.iter_unpack(output.read()))
        assert code == 0, "the guest's memory could not be read"
        (*_rest, first), (*_times, last) = records[0], records[-1]
        written = self._pages(last) - self._pages(first)
        self.rate = written * PAGE / (records[-1][3] - records[0][0])
        self.gaps = [
            Gap(still - seen, moved - before, seen, _instant(position))
            for before, seen, still, moved, _, position in records[1:]
        ]

    @property
    def longest(self) -> Gap:
        """The gap with the greatest lower bound."""
        return max(self.gaps, key=lambda gap: gap.seconds)

    def between(self, started_at: float, ended_at: float) -> list[Gap]:
        """The gaps that began in that time, of time.monotonic()."""
        return [gap for gap in self.gaps if started_at <= gap.started_at <= ended_at]

    def _pages(self, position: int) -> int:
        instant = _instant(position)
        return instant.generation * self._guest.setup.working_pages + instant.written


def _instant(position: int) -> Instant:
    return Instant(position >> 32, position & 0xFFFFFFFF)


@functools.cache
def _program() -> str:
    """The poller, compiled once a session."""
    directory = _scratch()
    program = Path(directory.name) / "progress_poller"
    source = Path(__file__).with_name("progress_poller.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", source, "-o", program], check=True)
    return str(program)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory that is removed when the interpreter ends."""
    return tempfile.TemporaryDirectory(prefix="progress-poller-")
