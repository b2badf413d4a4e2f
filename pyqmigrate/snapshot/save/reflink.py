"""Write a whole mapped-ram snapshot that shares its unchanged pages with a base on disk.

A file system with reflinks (XFS, btrfs) makes the new file a clone of the base at once, whatever its
size (FICLONE). The changed pages are written over their old content; so are the bitmaps and the tail::

    writer = ReflinkWriter(output, base, channels=2)
    writer.begin()                               # NotSupported on other file systems
    report = writer.write(blocks, selections, tail)

The order of writes is that of other snapshots: the magic comes last, by ``output.publish``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Sequence

from pyqmigrate.core import File
from pyqmigrate.errors import Cancelled, NotSupported, UsageError, target_error
from pyqmigrate.format.stream.wire import MAGIC, RAM_NAME
from pyqmigrate.format.stream.writer import RAM_SECTION_ID
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, check_channels, selected_ranges, split_ranges
from pyqmigrate.io.memory import RamBlock, attach
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.pages import BlockPages, write_pages
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.snapshot.save.writer import SaveReport, Sparse

__all__ = ["ReflinkWriter"]

_FICLONE = 0x40049409
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)


class ReflinkWriter:
    """A clone of ``base`` being changed into another snapshot, in the new, empty file ``target``.

    ``settings`` is the configuration of the stream, which is the base's. The target and the base are
    borrowed. Raises UsageError if the stream of the base does not start at the start of its file.
    """

    def __init__(self, target: OutputFile, base: MappedRamSnapshot, *, channels: int = 2) -> None:
        self.target = target
        self.settings = base.stream_file.configuration
        self.channels = Channels(check_channels(channels), "pyqmigrate-save")
        self._base = base
        if base.offset or target.offset:
            raise UsageError(
                f"the base {base.source.name!r} is behind a header of libvirt, which a clone would keep: "
                "save without full (an increment costs as little), or a whole snapshot by the live "
                "method changed, without a base"
            )

    def begin(self) -> None:
        """Make the target a clone of the base, without a magic. Raises NotSupported with the reason."""
        name = self.target.name
        try:
            fcntl.ioctl(self.target.fd, _FICLONE, self._base.source.fd)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise target_error(error, "cannot clone the base into", name) from error
            where = (
                "another file system than the base"
                if error.errno == errno.EXDEV
                else f"a file system without reflinks ({error.strerror})"
            )
            raise NotSupported(
                f"the file {name!r} cannot share pages with the base: it is on {where}; XFS and btrfs "
                "have reflinks. Without full an increment is written, which costs as little"
            ) from error
        self.target.write_at(0, bytes(len(MAGIC)))
        # The clone's end is written by this package, with its own id of RAM; QEMU's ids differ.
        start = next(s for s in self._base.stream.sections if s.name == RAM_NAME)
        self.target.write_at(start.offset + 1, RAM_SECTION_ID.to_bytes(4, "big"))

    @property
    def total(self) -> int:
        """Bytes of guest memory."""
        return sum(block.length for block in self._base.blocks.values())

    def write(
        self,
        blocks: Sequence[RamBlock],
        selections: Sequence[Bitmap | None],
        tail: Callable[[], Iterable[bytes]],
    ) -> SaveReport:
        """Write the selected pages of ``blocks``, which are in the order of the base; then bitmaps and
        ``tail``. None selects all pages of a block.

        A selected page that is zero is written as zeros, and its bit is set. Raises UsageError for
        other blocks than the base's, GuestMemoryError, TargetError (NoSpace), Cancelled.
        """
        started = time.monotonic()
        layouts = self._base.layouts
        with contextlib.ExitStack() as stack:
            pages = []
            for block, selection, layout in zip(blocks, selections, layouts, strict=True):
                memory = attach(block, writable=False)
                stack.callback(memory.close)
                if (block.name, memory.length) != (layout.name, layout.length):
                    raise UsageError(f"block {block.name!r} is not the base's {layout.name!r}")
                data = Bitmap(layout.num_pages)
                stack.callback(data.close)
                data.add(self._base.blocks[layout.name].bitmap)
                pages.append(BlockPages(layout, data, memory, selection))
            # Only buffered: a direct write would take neighbours of a page along.
            write_pages(
                pages,
                File(self.target.fd),
                Sparse.DENSE.policy(mark_zero=True),
                self.channels,
                self.target.name,
                _ranges(pages),
            )
            for page in pages:
                page.data.write_to(self.target, page.layout.bitmap_offset, everything=True)
            end = max(layout.pages_end for layout in layouts)
            try:
                os.ftruncate(self.target.fd, end)
            except OSError as error:
                raise target_error(error, "cannot truncate", self.target.name) from error
            for piece in tail():
                self.target.write_at(end, piece)
                end += len(piece)
            if self.channels.cancelled:
                raise Cancelled("cancelled")
            self.target.flush()
            return self._report(started)

    def _report(self, started: float) -> SaveReport:
        totals = self.channels.totals()
        return SaveReport(
            data_pages=totals.data_pages,
            zero_pages=totals.zero_pages,
            bytes_written=totals.bytes_moved,
            bytes_allocated=self.target.allocated_bytes(),
            file_size=os.fstat(self.target.fd).st_size,
            seconds=time.monotonic() - started,
            direct_io=False,
            direct_io_reason="changed pages are written over a clone, one by one",
            channels=self.channels.count,
            sparse=Sparse.DENSE,
            unaligned_blocks=(),
        )


def _ranges(blocks: Sequence[BlockPages]) -> Iterable[Range]:
    for number, block in enumerate(blocks):
        if block.selection is None:
            yield from split_ranges(number, block.layout.num_pages, block.layout.page_size)
        else:
            yield from selected_ranges(number, block.selection, block.layout.page_size)
