"""The pages that a guest touched after a restore: ``SNAPSHOT.workingset``, beside it.

A later restore reads these ahead. The file starts with a line as
:mod:`pyqmigrate.format.snapshot_companion` has it, of the format "pyqmigrate-working-set", with these
keys more::

    runs        how many runs there are
    seconds     how long the guest was watched, a number

Its body has 16 bytes for each run, little-endian, in the order in which the pages were first touched.
Runs that were observed together are in page order::

    u32 block, its place in the list; u32 pages; u64 first page

A run lies within its block. Runs may overlap, but all runs together have no more pages than all blocks.
"""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pyqmigrate.errors import UsageError
from pyqmigrate.format import suffixes
from pyqmigrate.format.snapshot_companion import CompanionKind, CompanionLine, read_number
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec

__all__ = ["RUNS_MAX", "SUFFIX", "WORKING_SET", "TouchedRun", "WorkingSet", "WorkingSetLine"]

SUFFIX = suffixes.WORKING_SET
WORKING_SET = CompanionKind("pyqmigrate-working-set", "working set")
RUNS_MAX = 1 << 20  # 16 MiB; a recorder joins runs before it has more
_RUN = struct.Struct("<IIQ")
_SECONDS_MAX = 1e9


class TouchedRun(NamedTuple):
    """Pages ``[first, first + npages)`` of block number ``block``."""

    block: int
    first: int
    npages: int


class WorkingSet:
    """Runs of pages in the order of their first touch; 16 bytes each, however many they are."""

    def __init__(self, runs: Iterable[TouchedRun] = ()) -> None:
        self._words = array.array("Q")
        for run in runs:
            self.append(run)

    def append(self, run: TouchedRun) -> None:
        """Add a run. UsageError for one that cannot be written, and after ``RUNS_MAX``."""
        if not (0 <= run.block < 1 << 32 and 0 < run.npages < 1 << 32 and 0 <= run.first < 1 << 63):
            raise UsageError(f"{run} cannot be a run of pages")
        if len(self) == RUNS_MAX:
            raise UsageError(f"a working set has at most {RUNS_MAX} runs")
        self._words.append(run.block | run.npages << 32)
        self._words.append(run.first)

    def __len__(self) -> int:
        return len(self._words) // 2

    def __iter__(self) -> Iterator[TouchedRun]:
        for k in range(0, len(self._words), 2):
            word = self._words[k]
            yield TouchedRun(word & 0xFFFFFFFF, self._words[k + 1], word >> 32)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorkingSet) and self._words == other._words

    __hash__ = None  # type: ignore[assignment]

    @property
    def npages(self) -> int:
        """Pages of all runs."""
        return sum(run.npages for run in self)

    def encode(self) -> bytes:
        """Return the body of the file."""
        return _turned(self._words).tobytes()

    @classmethod
    def decode(cls, body: bytes) -> WorkingSet:
        """Read the body, of whole runs; nothing but its length is checked. Raises SnapshotError."""
        if len(body) % _RUN.size:
            raise WORKING_SET.fault("the last run is cut off")
        found = cls()
        words = array.array("Q")
        words.frombytes(body)
        found._words = _turned(words)
        return found


@dataclass(frozen=True)
class WorkingSetLine:
    """The line of a working set. ``runs`` are how many, ``seconds`` how long the guest was watched."""

    line: CompanionLine
    runs: int
    seconds: float

    @classmethod
    def of(
        cls, snapshot: SnapshotId, blocks: Iterable[BlockSpec], runs: int, seconds: float
    ) -> WorkingSetLine:
        more = {"runs": runs, "seconds": seconds}
        return cls(CompanionLine(WORKING_SET, snapshot, tuple(blocks), more), runs, seconds)

    @property
    def snapshot(self) -> SnapshotId:
        return self.line.snapshot

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        return self.line.blocks

    @property
    def body_size(self) -> int:
        """Bytes of all runs."""
        return self.runs * _RUN.size

    def encode(self, working_set: WorkingSet) -> bytes:
        """Return the line for these runs. Raises UsageError for runs outside of the blocks."""
        fault = self._fault(working_set)
        if fault is not None:
            raise UsageError(fault)
        return self.line.encode([working_set.encode()])

    @classmethod
    def decode(cls, data: bytes) -> WorkingSetLine:
        """Read the line from the first ``LINE_MAX`` bytes of a file. Raises SnapshotError."""
        line = CompanionLine.decode(WORKING_SET, data)
        runs = read_number(WORKING_SET, line.more, "runs")
        if runs > RUNS_MAX:
            raise WORKING_SET.fault(f"{runs} runs, more than {RUNS_MAX}")
        seconds = line.more.get("seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise WORKING_SET.fault("seconds is not a number")
        if not 0 <= seconds <= _SECONDS_MAX:
            raise WORKING_SET.fault("seconds is out of its range")
        return cls(line, runs, float(seconds))

    def decode_runs(self, body: bytes) -> WorkingSet:
        """Read the runs, each of them checked. Raises SnapshotError."""
        self.line.check([body])
        if len(body) != self.body_size:
            raise WORKING_SET.fault(f"{len(body)} bytes of runs, expected {self.body_size}")
        working_set = WorkingSet.decode(body)
        fault = self._fault(working_set)
        if fault is not None:
            raise WORKING_SET.fault(fault)
        return working_set

    def _fault(self, working_set: WorkingSet) -> str | None:
        if len(working_set) != self.runs:
            return f"{len(working_set)} runs, expected {self.runs}"
        pages = [block.length // block.page_size for block in self.blocks]
        left = sum(pages)
        for number, (block, first, npages) in enumerate(working_set):
            if block >= len(pages) or npages == 0 or npages > pages[block] - first:
                return f"run {number}: block {block} has no pages {first} to {first + npages}"
            left -= npages
        return "the runs have more pages than all blocks" if left < 0 else None


def _turned(words: array.array[int]) -> array.array[int]:
    """The words in little-endian order, or such words in the machine's own."""
    if sys.byteorder == "little":
        return words
    turned = words[:]
    turned.byteswap()
    return turned
