"""The mapped-ram file that ``convert`` makes of an increment and its base, without its pages.

    outline = Outline(increment, Descriptors(fd))
    outline.write(known)

The file has the header, the bitmaps, device state and description at their places; the pages are holes.
A caller that reads them from the increment itself needs no copy of all memory.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from dataclasses import dataclass

from pyqmigrate.enums import Format
from pyqmigrate.errors import GuestMemoryError
from pyqmigrate.export.carried import carried_of
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.pages import count_pages
from pyqmigrate.io.target import Descriptors
from pyqmigrate.snapshot.base import error_from_errno
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions

__all__ = ["DecidedPages", "Outline"]


@dataclass(frozen=True)
class DecidedPages:
    """Pages of a block that need not be read: the bits of ``decided`` are these pages, those of ``data``
    the ones among them that are not zero."""

    decided: Bitmap
    data: Bitmap

    def close(self) -> None:
        self.decided.close()
        self.data.close()


class Outline:
    """The outline of an open increment, which is borrowed, in an empty file. It is closed by
    :meth:`write` or :meth:`close`.

    ``layouts`` are the places of the blocks, ``size`` the size of the file up to device state. Raises the
    errors of ``convert``.
    """

    def __init__(self, source: IncrementSnapshot, target: Descriptors) -> None:
        self._source = source
        self._carried = carried_of(source.source, source.stream, None)
        self._writer = _Outline(
            target,
            [
                RamBlock(block.name, block.memory(), block.page_size, block.address or 0)
                for block in source.blocks.values()
            ],
            SaveOptions(
                machine=source.stream.machine,
                target_page_bits=source.stream.target_page_bits,
                uuid=source.stream.uuid,
                before=self._carried.before,
            ),
        )

    @property
    def layouts(self) -> tuple[BlockLayout, ...]:
        return self._writer.head.blocks

    def write(self, known: Sequence[DecidedPages]) -> None:
        """Write all but the pages, for which those are read that ``known``, one for each block, does not
        decide: a page of zeros has its bit clear. Raises SnapshotError, TargetError."""
        source, writer = self._source, self._writer
        with contextlib.closing(writer), contextlib.ExitStack() as stack:
            writer.begin()
            selections = []
            for block, pages in zip(source.blocks.values(), known, strict=True):
                selection = block.base_only()
                stack.callback(selection.close)
                selection.add(block.bitmap)
                selection.remove(pages.decided)
                selections.append(selection)
            try:
                writer.write_pages(selections)
            except GuestMemoryError as error:
                # The "memory" here is the source.
                raise error_from_errno(
                    error.errno or errno.EIO, source.source, error.block or ""
                ) from error
            for bitmap, pages in zip(writer.bitmaps, known, strict=True):
                bitmap.add(pages.data)
            writer.finish_with(
                self._carried.tail(source.source, Format.MAPPED_RAM, writer.settings)
            )

    def close(self) -> None:
        """Idempotent."""
        self._writer.close()


class _Outline(Writer):
    """Looks for zero pages as a save does, and writes none."""

    def write_pages(
        self, selections: Sequence[Bitmap | None] | None = None, *, tables: object = None
    ) -> None:
        count_pages(self._stored(self.bitmaps, selections), self.channels, self.target.name)

    def _needed(self) -> int:
        return 0
