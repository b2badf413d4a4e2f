"""Pages of a snapshot of a store, read from its packs: no mount, and several reads at once.

Every page is compared with its digest by the store.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from array import array
from collections.abc import Sequence

from pyqmigrate.errors import NotSupported, PyqmigrateError, TargetError
from pyqmigrate.format.postcopy.records import RecordData
from pyqmigrate.format.seal import SUFFIX as SEAL_SUFFIX
from pyqmigrate.format.seal import SealLine
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.format.stream.mapped_ram_reader import parse
from pyqmigrate.format.working_set import SUFFIX as WORKING_SET_SUFFIX
from pyqmigrate.format.working_set import TouchedRun
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.threads import start_thread
from pyqmigrate.page_server.sources import PageSource, ReadAt, guest_state
from pyqmigrate.store.pack_cache import default_directory
from pyqmigrate.store.store import Store
from pyqmigrate.store.stored_file import StoredFile

__all__ = ["StoredSource"]

_LOCAL_READERS = 2
_REMOTE_READERS = 16


class StoredSource(PageSource):
    """A snapshot ``STORE#NAME``. Raises the errors of :meth:`~pyqmigrate.store.store.Store.open_file`.

    cache_directory: where the packs of a remote store are kept; None is the default.
    patience: for how many seconds a read is repeated if the store does not answer.
    """

    def __init__(
        self, snapshot: str, cache_directory: str | None = None, *, patience: float = 30.0
    ) -> None:
        place, _, stored = snapshot.rpartition("#")
        self.name = snapshot
        self._stack = contextlib.ExitStack()
        self._data: list[Bitmap] = []
        self._stop = threading.Event()
        self._prefetching: threading.Thread | None = None
        try:
            cache = (cache_directory or default_directory()) if "://" in place else None
            store = self._store = self._stack.enter_context(
                Store.open(place, cache=cache, patience=patience)
            )
            self.name = f"{store.name}#{stored}"
            self.readers = _LOCAL_READERS if store.place.directory else _REMOTE_READERS
            self._file = _StoredBytes(self._stack.enter_context(store.open_file(stored)), self.name)
            seal = SealLine.decode(_line_of(bytes(self._file.file.companions[SEAL_SUFFIX])))
            self.identity = SnapshotId(self._file.size, self._file.file.mtime_ns, seal.digest)
            stream = parse(self._file, seal.head.offset)
            self._blocks = stream.blocks
            if any(block.external for block in stream.blocks):
                raise NotSupported("the content of some blocks is in other files (x-ignore-shared)")
            for block in stream.blocks:
                self._data.append(self._bitmap(block, seal.head.bitmap_order))
            specs = [BlockSpec(b.name, b.length, b.page_size) for b in stream.blocks]
            self.state = guest_state(stream, specs, self._file)
        except BaseException:
            self.close()
            raise

    def _bitmap(self, block: BlockLayout, order: str) -> Bitmap:
        """Return the bitmap of a block, whose words are in the ``order`` of the host that wrote it."""
        bitmap = Bitmap(block.num_pages)
        length = (block.num_pages + 7) // 8
        if order == "big":
            length = (length + 7) // 8 * 8
        data = self._file.read_at(block.bitmap_offset, length)
        if order == "big":
            words = array("Q", data)
            words.byteswap()
            data = words.tobytes()
        bitmap.fill(memoryview(data))
        return bitmap

    def data(self, block: int) -> Bitmap:
        return self._data[block]

    def read(self, block: int, first: int, npages: int) -> RecordData:
        layout = self._blocks[block]
        size = layout.page_size
        return self._file.view(layout.pages_offset + first * size, npages * size)

    def prefetch(self, runs: Sequence[TouchedRun]) -> None:
        ranges = []
        for run in runs:
            layout = self._blocks[run.block]
            size = layout.page_size
            ranges.append((layout.pages_offset + run.first * size, run.npages * size))
        thread = threading.Thread(
            target=self._prefetch, args=(ranges,), name="pyqmigrate-prefetch", daemon=True
        )
        with contextlib.suppress(TargetError):  # no thread: the pages are read when they are sent
            start_thread(thread)
            self._prefetching = thread

    def _prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Load the frames that have the ranges, also while the guest waits for a page, as it always does."""
        with contextlib.suppress(PyqmigrateError, OSError):  # met again when the pages are sent
            self._file.file.prefetch(ranges, workers=self.readers, stop=self._stop, gives_way=False)

    def working_set(self) -> bytes:
        return bytes(self._file.file.companions.get(WORKING_SET_SUFFIX, b""))

    def write_working_set(self, content: bytes) -> None:
        self._store.write_working_set(self._file.file.name, content)

    def close(self) -> None:
        self._stop.set()
        if self._prefetching is not None:
            self._prefetching.join()
            self._prefetching = None
        for bitmap in self._data:
            bitmap.close()
        self._data = []
        self._stack.close()


class _StoredBytes(ReadAt):
    """A stored file as the parser of streams reads it."""

    def __init__(self, file: StoredFile, name: str) -> None:
        self.file = file
        self._name = name
        self.size = file.size

    def read_at(self, offset: int, length: int) -> bytes:
        return bytes(self.file.read(offset, length))

    def view(self, offset: int, length: int) -> RecordData:
        """Return exactly ``length`` bytes. Raises TargetError."""
        data = self.file.read(offset, length)
        if len(data) != length:
            raise TargetError(errno.EIO, "the stored file ends within a page", self._name)
        return data


def _line_of(seal: bytes) -> bytes:
    return seal[: seal.find(b"\n") + 1]
