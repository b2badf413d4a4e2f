"""Pages of a snapshot in a file: mapped-ram, an increment with its base, or a sequential stream."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pyqmigrate.enums import Format
from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.postcopy.records import RecordData
from pyqmigrate.format.seal import PIECE
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.integrity.manifest import Manifest, read_manifest
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.memory import SnapshotMemory
from pyqmigrate.io.page_sending import PagesInFile
from pyqmigrate.io.place import seal_path
from pyqmigrate.io.target import Descriptors
from pyqmigrate.page_server.pieces import OpenFile, SealedFile
from pyqmigrate.page_server.sources import PageSource, guest_state
from pyqmigrate.snapshot.base import Snapshot, error_from_errno
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot

__all__ = ["Layer", "MappedRamSource", "SequentialSource", "open_file_source"]


def open_file_source(
    name: str, *, sealed: bool, base: str | None = None, offset: int | None = None
) -> PageSource:
    """Open a snapshot in a file, or in a view. See :func:`pyqmigrate.page_server.sources.open_source`."""
    snapshot = open_snapshot(name, base=base, offset=offset)
    try:
        if any(block.external for block in snapshot.blocks.values()):
            raise NotSupported(
                "the content of some blocks is in other files (x-ignore-shared), which QEMU cannot "
                "combine with a post-copy migration"
            )
        if isinstance(snapshot, MappedRamSnapshot | IncrementSnapshot):
            return MappedRamSource(snapshot, sealed=sealed)
        if snapshot.source.forward:
            return _unpacked(snapshot, sealed=sealed)
        return SequentialSource(snapshot, sealed=sealed)
    except BaseException:
        snapshot.close()
        raise


def specs_of(snapshot: Snapshot) -> list[BlockSpec]:
    """Return the blocks of a snapshot."""
    return [BlockSpec(b.name, b.length, b.page_size) for b in snapshot.blocks.values()]


@dataclass(frozen=True)
class Layer:
    """A block in a mapped-ram file; ``present`` are the pages that the file decides."""

    file: OpenFile | SealedFile
    layout: BlockLayout
    present: Bitmap

    def read(self, first: int, npages: int) -> RecordData:
        size = self.layout.page_size
        return self.file.read_at(self.layout.pages_offset + first * size, npages * size)


class MappedRamSource(PageSource):
    """A mapped-ram file, or an increment and its base; the snapshot is taken over."""

    window = PIECE // 4096

    def __init__(self, snapshot: MappedRamSnapshot | IncrementSnapshot, *, sealed: bool) -> None:
        self._snapshot = snapshot
        self.name = snapshot.source.name
        self.identity = _identity(snapshot)
        self._data: list[Bitmap] = []
        self._files: list[SealedFile] = []
        try:
            top = snapshot.changes if isinstance(snapshot, IncrementSnapshot) else snapshot
            file = self._file_of(top, sealed=sealed)
            self._layers = [[Layer(file, b.layout, b.bitmap)] for b in top.blocks.values()]
            if isinstance(snapshot, IncrementSnapshot):
                base = self._file_of(snapshot.base, sealed=sealed)
                for layers, name in zip(self._layers, top.blocks, strict=True):
                    block = snapshot.base.blocks[name]
                    layers.append(Layer(base, block.layout, block.bitmap))
            for layers in self._layers:
                data = Bitmap(layers[0].layout.num_pages)
                self._data.append(data)
                for layer in layers:
                    data.add(layer.present)
            self.state = guest_state(top.stream, specs_of(top), file)
        except BaseException:
            self._drop()
            raise

    def _file_of(self, snapshot: MappedRamSnapshot, *, sealed: bool) -> OpenFile | SealedFile:
        """Return the file of a snapshot, compared with its seal if it has one.

        What was read already is compared here: headers, bitmaps, and what follows the pages.
        """
        source = snapshot.source
        file = OpenFile(source.file_fd, source.name)
        manifest = _seal_of(snapshot) if sealed else None
        if manifest is None:
            return file
        self.window = PIECE // 4096
        checked = SealedFile(file, source.file_size, manifest)
        self._files.append(checked)
        position = 0
        for layout in snapshot.layouts:
            checked.check(position, layout.header_end)
            checked.check(layout.bitmap_offset, layout.bitmap_offset + (layout.num_pages + 7) // 8)
            position = layout.pages_end
        checked.check(min(position, source.file_size), source.file_size)
        return checked

    def data(self, block: int) -> Bitmap:
        return self._data[block]

    def read(self, block: int, first: int, npages: int) -> RecordData:
        layers = self._layers[block]
        if len(layers) == 1:
            return layers[0].read(first, npages)
        upper, lower = layers
        end = first + npages
        parts = []
        while first < end:
            stop = upper.present.run_end(first, end)
            layer = upper if upper.present[first] else lower
            parts.append(layer.read(first, stop - first))
            first = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def place(self, block: int) -> PagesInFile | None:
        layers = self._layers[block]
        if self.readers or len(layers) > 1:
            return None
        file, layout = layers[0].file, layers[0].layout
        if not isinstance(file, SealedFile):
            return PagesInFile(file.fd, layout.pages_offset)
        if layout.pages_end > file.size:
            return None
        return PagesInFile(file.file.fd, layout.pages_offset, file.checked)

    def _drop(self) -> None:
        for bitmap in self._data:
            bitmap.close()
        for file in self._files:
            file.close()
        self._data, self._files = [], []

    def close(self) -> None:
        self._drop()
        self._snapshot.close()


def _identity(snapshot: Snapshot) -> SnapshotId:
    source = snapshot.source
    return identify_snapshot(source.name if source.place is None else source.place, source.file_fd)


def _seal_of(snapshot: Snapshot) -> Manifest | None:
    place = snapshot.source.place
    return None if place is None else read_manifest(seal_path(place))


class SequentialSource(PageSource):
    """A sequential stream, whose pages are found by an index; the snapshot is taken over.

    A pass over the whole stream finds them, and the seal is compared in one, too.
    """

    def __init__(self, snapshot: Snapshot, *, sealed: bool) -> None:
        self._snapshot = snapshot
        self.name = snapshot.source.name
        self.identity = _identity(snapshot)
        if sealed:
            _check_whole(snapshot)
        snapshot.prepare_random_reads()
        self._specs = specs_of(snapshot)
        self._memories: Sequence[SnapshotMemory] = [
            block.memory() for block in snapshot.blocks.values()
        ]
        self._data: list[Bitmap] = []
        try:
            for block in snapshot.blocks.values():
                data = Bitmap(block.num_pages)
                self._data.append(data)
                for first, end, present in block.runs():
                    if present:
                        data.add_range(first, end)
            source = snapshot.source
            file = OpenFile(source.fd, source.name)
            self.state = guest_state(snapshot.stream, self._specs, file)
        except BaseException:
            self._drop()
            raise

    def data(self, block: int) -> Bitmap:
        return self._data[block]

    def read(self, block: int, first: int, npages: int) -> RecordData:
        spec = self._specs[block]
        try:
            return self._memories[block].source.read(
                first * spec.page_size, npages * spec.page_size
            )
        except OSError as error:
            raise error_from_errno(error.errno or 5, self._snapshot.source, spec.name) from None

    def _drop(self) -> None:
        for bitmap in self._data:
            bitmap.close()
        self._data = []

    def close(self) -> None:
        self._drop()
        self._snapshot.close()


def _unpacked(snapshot: Snapshot, *, sealed: bool) -> PageSource:
    """Return a source for a compressed stream, which is taken over: what it contains, in an unnamed file.

    The file is made beside the snapshot, or among temporary files. Raises TargetError without space.
    """
    # Loaded only for this: a guest waits for the imports of its page server.
    from pyqmigrate.export.convert import convert
    from pyqmigrate.store.plain_snapshot import unnamed_file

    if sealed:
        _check_whole(snapshot)
    name, identity = snapshot.source.name, _identity(snapshot)
    fd = unnamed_file(None, snapshot.source.place)
    try:
        convert(snapshot, Descriptors(fd), to=Format.MAPPED_RAM)
        unpacked = open_snapshot(Descriptors(fd))
    finally:
        os.close(fd)
    assert isinstance(unpacked, MappedRamSnapshot)
    source = MappedRamSource(unpacked, sealed=False)
    source.name, source.identity = name, identity
    snapshot.close()
    return source


def _check_whole(snapshot: Snapshot) -> None:
    """Compare a file with its seal, if it has one. Raises SnapshotError if they differ."""
    if snapshot.source.place is None:
        return
    from pyqmigrate.integrity.verify import verify_seal

    check = verify_seal(os.fspath(snapshot.source.place))
    if check is not None and not check.intact:
        raise SnapshotError(
            f"{snapshot.source.name!r} is not as it was sealed: {'; '.join(map(str, check.damages))}"
        )
