"""Which pages of a snapshot were changed, and which a guest touched: a bitmap for each block.

Changed is against another snapshot, or against the base of an increment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

from pyqmigrate.analysis.block_comparison import comparable, compared_block, unreadable
from pyqmigrate.analysis.selection import Selector
from pyqmigrate.errors import SnapshotError, TargetError, UsageError
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.page_comparison import PageComparison, compare_pages
from pyqmigrate.io.working_set_file import read_current_working_set, working_set_path
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.increment import IncrementSnapshot

__all__ = ["changed_against", "changed_since_base", "touched_pages"]


def changed_since_base(snapshot: IncrementSnapshot) -> dict[str, Bitmap]:
    """Return the pages that an increment has, which it owns. Raises SnapshotError."""
    return {name: block.bitmap for name, block in snapshot.blocks.items()}


def changed_against(
    snapshot: Snapshot,
    other: Snapshot,
    stack: contextlib.ExitStack,
    *,
    seals: bool,
    channels: int,
    progress: Callable[[Progress], object] | None,
) -> tuple[dict[str, Bitmap], list[str]]:
    """Return the pages of blocks that differ from those of ``other``, and notes for the user.

    Bitmaps are closed with ``stack``. Pages that ``other`` does not have are changed; blocks that it
    does not have are left out. Raises the errors of ``diff``.
    """
    selector = Selector(snapshot, other, seals=seals)
    comparisons: list[PageComparison] = []
    notes = []
    for name in snapshot.blocks:
        if not comparable(snapshot, other, name):
            notes.append(f"block {name!r} is not in both snapshots, and was not compared")
            continue
        comparison = compared_block(snapshot, other, name, selector)
        stack.callback(comparison.close)
        comparisons.append(comparison)
    threads = Channels(channels, "pyqmigrate-map")
    total = sum(each.selected_pages * each.page_size for each in comparisons)

    def failed(number: int, side: int, block: str) -> Exception:
        return unreadable(number, (snapshot, other)[side], block)

    Job(threads, total, partial(compare_pages, threads, comparisons, failed)).wait(progress)
    found = {}
    for comparison in comparisons:
        block = snapshot.blocks[comparison.name]
        bits = comparison.differing
        if bits.npages != block.num_pages:  # another length, or larger pages
            bits = _spread(comparison, block.num_pages, comparison.page_size // block.page_size)
            stack.callback(bits.close)
        found[comparison.name] = bits
    return found, notes


def _spread(comparison: PageComparison, npages: int, factor: int) -> Bitmap:
    """Return the differing pages as pages of a ``factor``-th of their size, and all that follow."""
    bits, differing, first = Bitmap(npages), comparison.differing, 0
    try:
        while first < differing.npages:
            end = differing.run_end(first, differing.npages)
            if differing[first]:
                bits.add_range(first * factor, end * factor)
            first = end
        bits.add_range(differing.npages * factor, npages)
    except BaseException:
        bits.close()
        raise
    return bits


def touched_pages(
    snapshot: Snapshot, stack: contextlib.ExitStack
) -> tuple[dict[str, Bitmap] | None, list[str]]:
    """Return the pages of ``SNAPSHOT.workingset``, None without one, and notes for the user.

    Bitmaps are closed with ``stack``. A file that is damaged or of another snapshot is a note.
    """
    source = snapshot.source
    if source.place is None or source.forward:
        return None, []
    path = working_set_path(source.place)
    if not path.exists():
        return None, []
    try:
        recorded = read_current_working_set(path, identify_snapshot(source.place, source.fd))
    except (UsageError, SnapshotError, TargetError, OSError) as error:
        return None, [f"the working set is not shown: {error}"]
    found: dict[str, Bitmap] = {}
    for spec in recorded.blocks:
        block = snapshot.blocks.get(spec.name)
        if block is None or (block.length, block.page_size) != (spec.length, spec.page_size):
            return None, ["the working set is not shown: it has other blocks"]
    for number, first, npages in recorded.working_set:
        spec = recorded.blocks[number]
        if spec.name not in found:
            found[spec.name] = Bitmap(spec.length // spec.page_size)
            stack.callback(found[spec.name].close)
        found[spec.name].add_range(first, first + npages)
    return found, []
