"""What a scan of memory finds, while it goes on."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Self, TypeVar

from pyqmigrate.analysis.memory_scan import MemoryScan

__all__ = ["ScanResults"]

T = TypeVar("T")


class ScanResults(Iterator[T]):
    """Results of a scan that is going on. ``notes`` are sentences about what it cannot do.

    Close it unless it is exhausted.
    """

    def __init__(
        self, scan: MemoryScan, results: Generator[T, None, None], notes: tuple[str, ...]
    ) -> None:
        self.notes = notes
        self._scan, self._results = scan, results

    @property
    def bytes_read(self) -> int:
        """How much was read from the file so far."""
        return self._scan.bytes_read

    @property
    def seconds(self) -> float:
        """Since the scan began."""
        return self._scan.seconds

    def __next__(self) -> T:
        return next(self._results)

    def close(self) -> None:
        """End the scan. Idempotent."""
        self._results.close()
        self._scan.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
