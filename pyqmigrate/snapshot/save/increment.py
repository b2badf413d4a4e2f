"""Write an increment: a mapped-ram stream of the pages that changed since a base snapshot.

    with open_snapshot("/snap/base") as opened:
        base = Base.of(opened)
    writer = IncrementWriter("/snap/monday", blocks, SaveOptions(machine=machine), base)
    with contextlib.closing(writer):
        writer.begin()
        writer.write_pages([changed, None])  # None: the block is not mapped from the base
        report = writer.finish(sections, description)

The file is described in docs/internals/format.md, "Increments". The order of writes is that of a
mapped-ram file; the magic of the increment comes last of all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pyqmigrate.core import Policy
from pyqmigrate.errors import UsageError
from pyqmigrate.format.increment import IncrementHeader, base_path
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import PAGES_ALIGNMENT
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Range, selected_ranges, split_ranges
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.in_use import FileId, files_in_use
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.target import Target, stream_offset
from pyqmigrate.io.view import BASE_INSTEAD
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport, Sparse, WriteObserver

if TYPE_CHECKING:
    from pyqmigrate.io.page_digests import DigestTable

__all__ = ["Base", "IncrementWriter", "increment_offset"]

_BITMAP_KEPT = 1 << 30  # bytes of a block
_NUMBERS_AND_MACHINE = 4096  # bytes: more than these parts of a header can have


@dataclass(frozen=True)
class Base:
    """The snapshot that an increment refers to: its path, its identity, and its RAM blocks in the
    order of the stream, without addresses.

    ``data`` are the bitmaps of blocks of at most 1 GiB, by name: the pages that are not zero.
    """

    path: str
    identity: SnapshotId
    blocks: tuple[BlockSpec, ...]
    data: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, snapshot: MappedRamSnapshot) -> Base:
        """Describe an open snapshot. Raises UsageError if it cannot be a base: it has no path, its
        stream is at an offset that was given, or blocks are not in the file."""
        source = snapshot.source
        if type(snapshot) is not MappedRamSnapshot:
            raise UsageError(
                f"{source.name!r} is an increment itself, and cannot be a base: use its base, or "
                "convert it to mapped-ram first"
            )
        if source.view is not None:
            raise UsageError(
                f"{source.name!r} is not a plain file, and cannot be a base: {BASE_INSTEAD}"
            )
        if source.place is None:
            raise UsageError("a base needs a path, which an increment names it by")
        if snapshot.offset and snapshot.libvirt is None:
            raise UsageError(f"the stream of a base starts at its start: {source.name!r}")
        if any(block.external for block in snapshot.blocks.values()):
            raise UsageError(f"{source.name!r} does not contain all of its blocks")
        return cls(
            str(source.place),
            identify_snapshot(source.place, source.fd),
            tuple(
                BlockSpec(block.name, block.length, block.page_size)
                for block in snapshot.blocks.values()
            ),
            {
                block.name: block.bitmap.to_bytes()
                for block in snapshot.blocks.values()
                if block.length <= _BITMAP_KEPT
            },
        )


def increment_offset(base: Base) -> int:
    """Return where the stream of an increment of ``base`` starts, bytes: a seal needs it."""
    path = os.path.abspath(base.path)
    header = IncrementHeader(
        path, base.identity, base.blocks, 0, "", stream_offset=16 * PAGES_ALIGNMENT
    )
    length = len(header.encode(magic=True)) + _NUMBERS_AND_MACHINE
    return -(-length // PAGES_ALIGNMENT) * PAGES_ALIGNMENT


class IncrementWriter(Writer):
    """An increment of ``base`` being written.

    The blocks have the names, lengths and page sizes of the base, in the same order. A page has its
    bit set if it was selected in any pass. A block that was passed None instead of a bitmap does not
    need the base: each page that has data here or in the base has its bit set, and the others are
    zero in both. If the pages of the base are not known, all bits are set. A selected page that is
    zero is a hole, except with ``Sparse.DENSE``. ``created_ns`` is when the guest stopped,
    nanoseconds since 1970, now if it is not given.

    The target is a path, which gets its name last, or Descriptors of a file; ``reuse``, ``left_out``
    and an offset raise UsageError, as do blocks that are not those of the base.
    """

    def __init__(
        self,
        target: Target,
        blocks: Sequence[RamBlock],
        options: SaveOptions,
        base: Base,
        observer: WriteObserver | None = None,
        *,
        created_ns: int | None = None,
    ) -> None:
        if options.reuse or options.left_out is not None or options.prefix:
            raise UsageError("an increment is a new file that contains all blocks of its base")
        if stream_offset(target):
            raise UsageError("an increment starts at the start of its file: give no offset")
        self.base = base
        self._created_ns = time.time_ns() if created_ns is None else created_ns
        self._machine = options.machine
        self._starts = increment_offset(base)
        options = replace(options, prefix=self._encode(base.path, 0), stream_offset=self._starts)
        super().__init__(target, blocks, options, observer)
        with self._closed_on_error():
            self._selected = [Bitmap(layout.num_pages) for layout in self.head.blocks]
            for bitmap in self._selected:
                self._cleanup.callback(bitmap.close)
            self._complete: set[int] = set()  # blocks with all bits set
            # Gaps between selected pages are not zeros: none is written along.
            self.policy = Policy(everything=self.sparse is Sparse.DENSE)

    def _open(self, target: Target, direct_io: DirectIO) -> None:
        self._check_blocks()  # before an existing file is changed
        super()._open(target, direct_io)

    def _check_blocks(self) -> None:
        found = tuple(BlockSpec(spec.name, spec.length, spec.page_size) for spec in self.specs)
        for ours, theirs in zip(found, self.base.blocks, strict=False):
            if ours != theirs:
                raise UsageError(
                    f"block {ours.name!r} with {ours.length} bytes in pages of {ours.page_size} is "
                    f"{theirs.name!r} with {theirs.length} in pages of {theirs.page_size} in the "
                    f"base {self.base.path!r}"
                )
        if len(found) != len(self.base.blocks):
            raise UsageError(
                f"{len(found)} blocks are given, and the base {self.base.path!r} has "
                f"{len(self.base.blocks)}"
            )

    def _in_use(self) -> dict[FileId, str]:
        what = f"the base of this increment ({self.base.path!r})"
        return files_in_use([(self.base.path, what)]) | super()._in_use()

    def write_pages(
        self,
        selections: Sequence[Bitmap | None] | None = None,
        *,
        tables: Sequence[DigestTable] | None = None,
    ) -> None:
        """Write the selected pages in one pass; without selections all pages of all blocks."""
        if selections is None:
            selections = [None] * len(self.specs)
        for number, selection in enumerate(selections):
            if selection is None:
                self._complete.add(number)
            else:
                self._selected[number].add(selection)
        direct = self.target.direct
        if direct is not None and self.specs[0].page_size < direct.off_align:
            self._stale = True  # writes are rounded outward, to pages that are not selected
        super().write_pages(selections, tables=tables)

    def _ranges(self, selections: Sequence[Bitmap | None] | None) -> Iterator[Range] | None:
        """Return the ranges that contain selected pages: the rest of memory is not looked at."""
        return None if selections is None else self._selected_ranges(selections)

    def _selected_ranges(self, selections: Sequence[Bitmap | None]) -> Iterator[Range]:
        for number, (selection, layout) in enumerate(
            zip(selections, self.head.blocks, strict=True)
        ):
            if selection is None:
                yield from split_ranges(number, layout.num_pages, layout.page_size)
            else:
                yield from selected_ranges(number, selection, layout.page_size)

    def finish_with(self, tail: Iterable[bytes]) -> SaveReport:
        """Write bitmaps, ``tail`` and the header, then publish."""
        if self._stale:
            self.clean()  # a page that an earlier pass wrote may be zero now
        for number, bitmap in enumerate(self.bitmaps):
            if number in self._complete:
                self._add_base(bitmap, self.specs[number].name)
            else:
                bitmap.add(self._selected[number])
        changed = sum(
            bitmap.count() * layout.page_size
            for bitmap, layout in zip(self.bitmaps, self.head.blocks, strict=True)
        )
        place = self.target.place
        path = self.base.path if place is None else base_path(self.base.path, str(place))
        self.target.prefix = self._encode(path, changed)
        return super().finish_with(tail)

    def _add_base(self, bitmap: Bitmap, block: str) -> None:
        """Add the pages that have data in the base; all of them if that is not known.

        QEMU need not load pages that are zero in both: that would give each guest a private copy of
        an empty screen.
        """
        data = self.base.data.get(block)
        if data is None:
            bitmap.add_all()
            return
        theirs = Bitmap(bitmap.npages)
        try:
            theirs.fill(memoryview(data))
            bitmap.add(theirs)
        finally:
            theirs.close()

    def _encode(self, path: str, changed: int) -> bytes:
        return IncrementHeader(
            path,
            self.base.identity,
            self.base.blocks,
            self._created_ns,
            self._machine,
            changed,
            self._starts,
        ).encode(magic=True)

    def _needed(self) -> int:
        """Return what is known before the first pass: nothing of what will be selected."""
        return 0
