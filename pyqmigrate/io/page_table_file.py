"""``SNAPSHOT.pages``: the digests of a snapshot's pages, kept for the next increment.

place = check_page_table_place("/snap/guest.mapped")      # before work begins
...
write_page_table(place, identity, blocks, digests.tables)  # when the snapshot has its name
table = read_page_table(page_table_path("/snap/guest.mapped"), blocks)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyqmigrate.errors import UsageError
from pyqmigrate.format.page_table import PAGE_TABLE, SUFFIX, PageTableLine
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.io.companion_file import (
    companion_path,
    open_companion,
    read_pieces,
    write_companion,
)
from pyqmigrate.io.own_files import FileKind, check_replaceable
from pyqmigrate.io.page_digests import DigestTable

__all__ = [
    "PAGE_TABLE_FILE",
    "PageTable",
    "check_page_table_place",
    "page_table_path",
    "read_page_table",
    "write_page_table",
]

PAGE_TABLE_FILE = FileKind(PAGE_TABLE.noun, PAGE_TABLE.is_ours)


@dataclass(frozen=True)
class PageTable:
    """The digests of the snapshot that is ``snapshot``, by block."""

    snapshot: SnapshotId
    tables: dict[str, DigestTable]


def page_table_path(snapshot: str | os.PathLike[str]) -> Path:
    """Return where the page table of a snapshot is."""
    return companion_path(snapshot, SUFFIX)


def check_page_table_place(snapshot: str | os.PathLike[str]) -> Path:
    """Return where the page table of a snapshot is to be written. Raises as
    :func:`~pyqmigrate.io.own_files.check_replaceable` where something else is there."""
    return check_replaceable(page_table_path(snapshot), PAGE_TABLE_FILE)


def write_page_table(
    place: Path,
    snapshot: SnapshotId,
    blocks: Sequence[BlockSpec],
    tables: Mapping[str, DigestTable],
    *,
    sync_name: bool = True,
) -> None:
    """Write the digests of all pages; the file has its name when it is whole and durable.

    Raises UsageError if the table of a block is missing or has another size, and otherwise as
    :func:`~pyqmigrate.io.own_files.write_whole` does.
    """
    for block in blocks:
        table = tables.get(block.name)
        if table is None or table.npages != block.length // block.page_size:
            raise UsageError(f"the digests of block {block.name!r} are missing")

    def body() -> Iterator[bytes]:
        for block in blocks:
            yield from tables[block.name].pieces()

    line = PageTableLine.of(snapshot, blocks).encode(body())
    write_companion(place, PAGE_TABLE_FILE, line, body(), sync_name=sync_name)


def read_page_table(path: Path, blocks: Sequence[BlockSpec]) -> PageTable | None:
    """Return the digests stored in ``path``; None if it does not exist.

    ``blocks`` are those of the snapshot, which bound what is read. The caller checks that it belongs
    to the snapshot as it is now (:meth:`SnapshotId.differs_from`). Raises SnapshotError for a file that is
    not a whole page table of these blocks, TargetError, NotSupported without memory.
    """
    with open_companion(path, PAGE_TABLE) as opened:
        if opened is None:
            return None
        fd, head = opened
        line = PageTableLine.decode(head)
        wanted = [(block.name, block.length, block.page_size) for block in blocks]
        if [(block.name, block.length, block.page_size) for block in line.blocks] != wanted:
            raise PAGE_TABLE.fault("the blocks are not those of the snapshot")
        tables: dict[str, DigestTable] = {}
        try:
            for block in line.blocks:
                tables[block.name] = DigestTable(block.length // block.page_size)
            pieces = read_pieces(fd, PAGE_TABLE, line.line.length, line.body_size)
            line.line.check(_fill(list(tables.values()), pieces))
        except BaseException:
            for table in tables.values():
                table.close()
            raise
        return PageTable(line.snapshot, tables)


def _fill(tables: Sequence[DigestTable], pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the pieces, each of them put into the tables first."""
    waiting = iter(tables)
    table, done = next(waiting, None), 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            assert table is not None  # the pieces are as long as all tables
            taken = rest[: table.nbytes - done]
            table.put(done, taken)
            done, rest = done + len(taken), rest[len(taken) :]
            if done == table.nbytes:
                table, done = next(waiting, None), 0
        yield piece
