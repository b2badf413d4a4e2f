"""Compare the pages of two snapshots, block by block.

    with PageComparison("pc.ram", (block_a.memory(), block_b.memory()), npages, 4096) as comparison:
        compare_pages(channels, [comparison], failed)
        print(comparison.differing.count())

Pages without data in both are equal, however they are stored; a page without data is equal to a page
of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from pyqmigrate import _core
from pyqmigrate.core import Channel
from pyqmigrate.errors import UsageError
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, selected_ranges, split_ranges
from pyqmigrate.io.memory import OpenMemory, SnapshotMemory

__all__ = ["PageComparison", "compare_pages"]


class PageComparison:
    """The first ``npages`` pages of one block, of ``page_size`` bytes, in two snapshots.

    ``differing`` has a bit for each page that was found to differ. ``selection``: only the pages whose
    bits are set are compared; it is closed along with this. The snapshots must stay open. Raises
    UsageError for more pages than a memory has.
    """

    def __init__(
        self,
        name: str,
        memories: tuple[SnapshotMemory, SnapshotMemory],
        npages: int,
        page_size: int,
        selection: Bitmap | None = None,
    ) -> None:
        self.name, self.npages, self.page_size = name, npages, page_size
        self.selection = selection
        self._open: list[OpenMemory] = []
        self._core = _core.ffi.new("struct qm_comparison *")
        self.differing = Bitmap(npages)
        try:
            for number, memory in enumerate(memories):
                if memory.length < npages * page_size:
                    raise UsageError(
                        f"block {name!r} has {memory.length} bytes, fewer than {npages} pages of "
                        f"{page_size}"
                    )
                self._open.append(OpenMemory(name, memory, writable=False))
                self._core.memory[number] = self._open[number].core
            self._core.npages, self._core.page_size = npages, page_size
            self._core.differing = self.differing.core
            if selection is not None:
                if selection.npages != npages:
                    raise UsageError(f"a selection of {selection.npages} pages for {npages}")
                self._core.selection = selection.core
        except BaseException:
            self.close()
            raise

    @property
    def selected_pages(self) -> int:
        """The number of pages that are compared."""
        return self.npages if self.selection is None else self.selection.count()

    @property
    def zero_pages(self) -> tuple[int, int]:
        """How many of the differing pages are zero in each of the snapshots."""
        return int(self._core.zero[0]), int(self._core.zero[1])

    def core(self, channels: Channels) -> Any:
        """Return the structure of the core, for a job of these channels."""
        self._core.job = channels.core.core
        return self._core

    def close(self) -> None:
        """Free the bitmaps. Idempotent."""
        for memory in self._open:
            memory.close()
        self.differing.close()
        if self.selection is not None:
            self.selection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def compare_pages(
    channels: Channels,
    comparisons: Sequence[PageComparison],
    failed: Callable[[int, int, str], BaseException],
) -> None:
    """Compare the selected pages of all blocks; wait.

    ``failed(number, side, block)`` returns the exception for pages that cannot be read: the errno,
    the number of the snapshot (0 or 1), and the name of the block. Raises that, MemoryError,
    Cancelled.
    """
    cores = [comparison.core(channels) for comparison in comparisons]

    def compare(channel: Channel, item: Range) -> int:
        return _core.lib.qm_compare_memories(
            cores[item.block], channel.core, item.first, item.npages, channel.fault.core
        )

    names = [comparison.name for comparison in comparisons]
    channels.run_readers(
        _ranges(comparisons),
        compare,
        names,
        lambda number, fault, block: failed(number, fault.block, block),
    )


def _ranges(comparisons: Sequence[PageComparison]) -> Iterator[Range]:
    for number, comparison in enumerate(comparisons):
        if comparison.selection is None:
            yield from split_ranges(number, comparison.npages, comparison.page_size)
        else:
            yield from selected_ranges(number, comparison.selection, comparison.page_size)
