"""Compare two snapshots, whatever kind of file each of them is.

    report = diff("/snap/monday.mapped", "/snap/tuesday.mapped", fields=True)
    for block in report.blocks:
        print(block.name, block.differing_pages)

Guests are compared, not files: a page of zeros is equal to a page without data, and old bytes under a
clear bit do not count.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from pyqmigrate.analysis.addresses import page_ranges, placements
from pyqmigrate.analysis.block_comparison import comparable, compared_block, opened, unreadable
from pyqmigrate.analysis.device_comparison import compare_devices, compare_fields
from pyqmigrate.analysis.naming import naming
from pyqmigrate.analysis.report import BlockDiff, DiffReport
from pyqmigrate.analysis.selection import Selector
from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.address_space.placement import Placement
from pyqmigrate.io.channels import Channels, check_channels
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.page_comparison import PageComparison, compare_pages
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["diff"]


def diff(
    a: Snapshot | Target,
    b: Snapshot | Target,
    *,
    pages: bool = False,
    fields: bool = False,
    seals: bool = True,
    channels: int = 2,
    page_size: int | None = None,
    base: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> DiffReport:
    """Compare two snapshots, and wait.

    a, b: an open snapshot, which stays open; or a path, a ``file:`` URI or Descriptors.
    pages: whether the report lists the ranges of pages that differ, with their guest addresses.
    fields: whether it lists the fields of devices that differ.
    seals: whether seals are believed: pages of a MiB are not read if it has the same digest in both
        files. An increment needs none to be compared with its base, or with another one of it.
    channels: threads that read, 1 to 255.
    page_size: of sequential streams, as for ``open_snapshot``.
    base: the path of the base of increments, instead of the one that they record.
    progress: called on this thread at most ten times a second; if it raises, the work ends.

    Devices are compared byte by byte. Raises SnapshotError for a damaged or incomplete file (a note
    names it), NotSupported for a stream that cannot be read at random (a compressed one) and, with
    fields, for device state that is too large to decode; UsageError, TargetError, Cancelled.
    """
    for name, value in (("pages", pages), ("fields", fields), ("seals", seals)):
        check(name, value, bool)
    check("page_size", page_size, int, type(None))
    check("base", base, str, os.PathLike, type(None))
    check_channels(channels)
    check_callback("progress", progress)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        both = []
        for target in (a, b):
            with naming(target):
                snapshot = stack.enter_context(opened(target, page_size, base))
                snapshot.prepare_random_reads(progress)
                if not snapshot.stream.complete:
                    raise SnapshotError(
                        "the end of the stream is missing: device state is cut off",
                        offset=snapshot.stream.end,
                    )
            both.append(snapshot)
        work = _Comparison(both[0], both[1], seals, channels)
        stack.callback(work.close)
        return work.run(pages, fields, progress, started)


class _Comparison:
    def __init__(self, a: Snapshot, b: Snapshot, seals: bool, channels: int) -> None:
        self._a, self._b = a, b
        self._selector = Selector(a, b, seals=seals)
        self._channels = Channels(channels, "pyqmigrate-diff")
        self._blocks: dict[str, PageComparison] = {}
        self._notes: list[str] = []

    def run(
        self,
        pages: bool,
        fields: bool,
        progress: Callable[[Progress], object] | None,
        started: float,
    ) -> DiffReport:
        a, b = self._a, self._b
        for name in a.blocks:
            if comparable(a, b, name):
                self._blocks[name] = compared_block(a, b, name, self._selector)
        comparisons = [*self._blocks.values()]
        total = sum(each.selected_pages * each.page_size for each in comparisons)
        job = Job(
            self._channels,
            total,
            lambda: compare_pages(self._channels, comparisons, self._unreadable),
        )
        job.wait(progress)
        devices, tail_differs = compare_devices(a, b)
        if fields:
            devices = compare_fields(a, b, devices, progress)
        return DiffReport(
            a=a.source.name,
            b=b.source.name,
            machines=(a.machine, b.machine),
            only_in_a=tuple(name for name in a.blocks if name not in b.blocks),
            only_in_b=tuple(name for name in b.blocks if name not in a.blocks),
            blocks=tuple(self._found(pages, progress)),
            devices=devices,
            tail_differs=tail_differs,
            seals=self._selector.by_seals,
            bytes_read=self._channels.totals().bytes_moved,
            seconds=time.monotonic() - started,
            notes=tuple(self._notes),
        )

    def _unreadable(self, number: int, side: int, block: str) -> Exception:
        return unreadable(number, (self._a, self._b)[side], block)

    def _found(
        self, pages: bool, progress: Callable[[Progress], object] | None
    ) -> Iterator[BlockDiff]:
        placed: tuple[Placement, ...] = ()
        if pages and any(each.differing.last() >= 0 for each in self._blocks.values()):
            placed, why_not = placements(self._a, progress)
            if why_not is not None:
                self._notes.append(why_not)
        for name, block in self._a.blocks.items():
            other = self._b.blocks.get(name)
            if other is None:
                continue
            lengths = block.length, other.length
            compared = self._blocks.get(name)
            if compared is None:
                yield BlockDiff(name, lengths, block.page_size, 0, external=True)
                continue
            yield BlockDiff(
                name,
                lengths,
                compared.page_size,
                compared.npages,
                compared.selected_pages,
                compared.differing.count(),
                compared.zero_pages,
                page_ranges(name, compared.page_size, compared.differing, placed)
                if pages
                else None,
            )

    def close(self) -> None:
        for comparison in self._blocks.values():
            comparison.close()
