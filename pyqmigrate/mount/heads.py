"""A view of a stored snapshot without its pages: for a restore whose pages come from a page server.

What a restore reads of a snapshot before the guest runs (headers, bitmaps, device state) is copied, some
hundred KiB; the rest of the file is a hole. No mount is made, and no process started.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyqmigrate.errors import NotSupported
from pyqmigrate.format.seal import SUFFIX as SEAL_SUFFIX
from pyqmigrate.format.seal import SealLine
from pyqmigrate.format.stream.mapped_ram_reader import parse
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.mount.copied import CopiedView
from pyqmigrate.mount.files import open_files
from pyqmigrate.mount.working_sets import check_recordable, write_working_set

__all__ = ["HeadView", "open_heads"]


def open_heads(place: str, name: str, cache: str) -> HeadView:
    """Return a view of the snapshot ``name`` of a store. Raises as
    :func:`pyqmigrate.mount.view.make_view`."""
    files = open_files(place, (name,), cache)
    try:
        file = files.open(name)
        try:
            return HeadView(file, place, name)
        finally:
            file.close()
    finally:
        files.close()


class HeadView(CopiedView):
    """A copy of all but the pages of ``file``, which is borrowed for the call."""

    def __init__(self, file: PlainFile, place: str, name: str) -> None:
        self._place, self._stored = place, name
        super().__init__(file, name, _ranges(file))

    def check_recordable(self) -> str:
        return check_recordable(self._place, self._stored)

    def write_working_set(self, content: bytes) -> None:
        write_working_set(self._place, self._stored, content)


class _Reader:
    """A plain file as the parser of streams reads it."""

    def __init__(self, file: PlainFile) -> None:
        self._file = file
        self.size = file.size

    def read_at(self, offset: int, length: int) -> bytes:
        return bytes(self._file.read(offset, length))


def _ranges(file: PlainFile) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of what is not pages."""
    seal = bytes(file.companions[SEAL_SUFFIX])
    head = SealLine.decode(seal[: seal.find(b"\n") + 1]).head
    stream = parse(_Reader(file), head.offset)
    if any(block.external for block in stream.blocks):
        raise NotSupported("the content of some blocks is in other files (x-ignore-shared)")
    position = 0
    for block in stream.blocks:
        yield position, block.pages_offset
        position = block.pages_end
    yield min(position, file.size), file.size
