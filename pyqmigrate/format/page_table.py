"""The digests of a snapshot's pages: ``SNAPSHOT.pages``, beside it.

With them, the next increment of a guest that does not map its snapshot takes one pass over its memory.
The file starts with a line as :mod:`pyqmigrate.format.snapshot_companion` has it, of the
format "pyqmigrate-pages", with one key more::

    algorithm   "xxh3-128"

Its body has the digest, 16 bytes, of each page of each block, blocks in the order of the list. No page
is left out: zero pages have the digest of zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm, Data
from pyqmigrate.format.snapshot_companion import CompanionKind, CompanionLine
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec

__all__ = ["PAGE_TABLE", "SUFFIX", "PageTableLine"]

SUFFIX = ".pages"
PAGE_TABLE = CompanionKind("pyqmigrate-pages", "page table")


@dataclass(frozen=True)
class PageTableLine:
    """The line of a page table."""

    line: CompanionLine

    @classmethod
    def of(cls, snapshot: SnapshotId, blocks: Iterable[BlockSpec]) -> PageTableLine:
        more = {"algorithm": str(Algorithm.XXH3_128)}
        return cls(CompanionLine(PAGE_TABLE, snapshot, tuple(blocks), more))

    @property
    def snapshot(self) -> SnapshotId:
        return self.line.snapshot

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        return self.line.blocks

    @property
    def body_size(self) -> int:
        """Bytes of all digests."""
        return sum(block.length // block.page_size for block in self.blocks) * DIGEST_SIZE

    def encode(self, body: Iterable[Data]) -> bytes:
        """Return the line for these digests, :attr:`body_size` bytes in all."""
        return self.line.encode(body)

    @classmethod
    def decode(cls, data: bytes) -> PageTableLine:
        """Read the line from the first ``LINE_MAX`` bytes of a file. Raises SnapshotError."""
        line = CompanionLine.decode(PAGE_TABLE, data)
        if line.more.get("algorithm") != Algorithm.XXH3_128:
            raise PAGE_TABLE.fault(f"{line.more.get('algorithm')!r} is not a supported algorithm")
        return cls(line)
