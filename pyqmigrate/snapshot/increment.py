"""An increment, opened for reading together with its base: the guest's memory is in both.

    with open_snapshot("/snap/monday") as snapshot:
        print(snapshot.base.source.name, snapshot.changed_pages)
        first_page = snapshot.blocks["pc.ram"].read(0, 4096)

Pages whose bit is set come from the increment, where a hole is a zero page, and all others from the
base (docs/internals/format.md, "Increments").
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from pyqmigrate.argument_types import check, check_mapping, check_names
from pyqmigrate.enums import Clear, Format
from pyqmigrate.errors import NotSupported, SnapshotError, TargetError, UsageError, target_error
from pyqmigrate.format.increment import IncrementHeader, base_location
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.configuration import MAPPED_RAM
from pyqmigrate.format.stream.mapped_ram import BlockLayout, ByteOrder
from pyqmigrate.format.stream.wire import Stream
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.in_use import FileId, Named, files_in_use
from pyqmigrate.io.job import Job
from pyqmigrate.io.layered import layered
from pyqmigrate.io.lock import lock_file
from pyqmigrate.io.memory import Memory, SnapshotMemory
from pyqmigrate.io.place import resolve_symlink, seal_path
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.base import Block, Snapshot
from pyqmigrate.snapshot.load.mapped_ram import Layer, LoadReport, start_load_layers
from pyqmigrate.snapshot.mapped_ram import MappedRamBlock, MappedRamSnapshot

__all__ = ["IncrementBlock", "IncrementSnapshot"]

_ELSEWHERE = "; base=PATH (--base PATH) names another place"


class IncrementBlock(Block):
    """One RAM block of an increment and its base.

    ``layout`` and ``bitmap`` are those of the increment: its places, and the pages that it has.
    ``changed`` and ``base`` are the block in the two files.
    """

    def __init__(
        self, snapshot: IncrementSnapshot, changed: MappedRamBlock, base: MappedRamBlock
    ) -> None:
        self._snapshot = snapshot
        self.changed = changed
        self.base = base
        self.name, self.length, self.page_size = changed.name, changed.length, changed.page_size
        self.address = None
        self._present: Bitmap | None = None

    @property
    def snapshot(self) -> IncrementSnapshot:
        return self._snapshot

    @property
    def layout(self) -> BlockLayout:
        return self.changed.layout

    @property
    def bitmap(self) -> Bitmap:
        return self.changed.bitmap

    @property
    def external(self) -> bool:
        return False

    @property
    def changed_pages(self) -> int:
        """Pages that the increment has, those that became zero included."""
        return self.changed.data_pages

    @property
    def data_pages(self) -> int:
        """Pages that are in the increment, and others with data in the base. A page that became
        zero counts, too."""
        return self._merged().count()

    def _merged(self) -> Bitmap:
        with self._snapshot._lock:
            if self._present is None:
                present = Bitmap(self.num_pages)
                try:
                    present.add(self.base.bitmap)
                    present.add(self.changed.bitmap)
                except BaseException:
                    present.close()
                    raise
                self._present = present
            return self._present

    def base_only(self) -> Bitmap:
        """Return a new bitmap of the pages whose data is in the base. Close it."""
        bitmap = Bitmap(self.num_pages)
        try:
            bitmap.add(self.base.bitmap)
            bitmap.remove(self.changed.bitmap)
        except BaseException:
            bitmap.close()
            raise
        return bitmap

    def memory(self) -> SnapshotMemory:
        return layered(
            self.changed.memory(), self.base.memory(), self.changed.bitmap, self.page_size
        )

    def runs(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int, bool]]:
        end = self.num_pages if end is None else end
        merged = self._merged()
        while first < end:
            stop = merged.run_end(first, end)
            yield first, stop, merged[first]
            first = stop

    def _close(self) -> None:
        if self._present is not None:
            self._present.close()
            self._present = None


class IncrementSnapshot(Snapshot):
    """An increment and its base, which is a mapped-ram file.

    ``header`` is the increment's; ``changes`` is the increment as a mapped-ram file by itself, whose
    clear pages are not zeros; ``base`` is the open base, with a shared lock.

    base: the path of the base, instead of the recorded one.
    bitmap_order: of the increment; that of the base is determined from it.

    Opening checks that the base is the right one. Raises SnapshotError for a damaged increment, for
    a base that was changed or is another file, and for one that cannot be a base, such as an
    increment; TargetError for a missing base.
    """

    format = Format.INCREMENT
    header: IncrementHeader

    def __init__(
        self,
        stream_file: StreamFile,
        *,
        base: str | os.PathLike[str] | None = None,
        bitmap_order: ByteOrder | None = None,
    ) -> None:
        super().__init__(stream_file)
        self._changes: MappedRamSnapshot | None = None
        self._base: MappedRamSnapshot | None = None
        self._blocks: Mapping[str, IncrementBlock] = {}
        try:
            if stream_file.increment is None:
                raise UsageError(f"{self.source.name!r} is not an increment")
            self.header = stream_file.increment
            check("base", base, str, os.PathLike, type(None))
            self._changes = MappedRamSnapshot(
                stream_file.share().without_header(), bitmap_order=bitmap_order
            )
            self._check_stream()
            self._base = _open_base(self.source.name, self._base_path(base), self.header)
        except BaseException:
            self.close()
            raise
        theirs = self._base.blocks
        self._blocks = MappingProxyType(
            {
                name: IncrementBlock(self, block, theirs[name])
                for name, block in self.changes.blocks.items()
            }
        )

    def _check_stream(self) -> None:
        """Check that the stream has the blocks and the machine of the header."""
        changes = self.changes
        if _specs(changes) != self.header.blocks:
            raise SnapshotError(
                "the blocks of the increment's stream are not those of its header", field="blocks"
            )
        if any(block.external for block in changes.blocks.values()):
            raise SnapshotError("the increment does not contain all of its blocks", field="blocks")
        if changes.machine != self.header.machine:
            raise SnapshotError(
                f"the stream is of machine {changes.machine!r}, and the header of "
                f"{self.header.machine!r}",
                field="machine",
            )

    def _base_path(self, given: str | os.PathLike[str] | None) -> str | Path:
        if given is not None:
            return os.fsdecode(given)
        recorded = self.header.base_path
        if self.source.place is None and not Path(recorded).is_absolute():
            raise UsageError(
                f"the base {recorded!r} is beside the increment, whose path is not known: give base"
            )
        increment = self.source.name if self.source.place is None else self.source.place
        return base_location(recorded, str(resolve_symlink(increment)))

    @property
    def changes(self) -> MappedRamSnapshot:
        if self._changes is None:
            raise UsageError("the snapshot is closed")
        return self._changes

    @property
    def base(self) -> MappedRamSnapshot:
        if self._base is None:
            raise UsageError("the snapshot is closed")
        return self._base

    @property
    def blocks(self) -> Mapping[str, IncrementBlock]:
        return self._blocks

    @property
    def machine(self) -> str:
        return self.changes.machine

    @property
    def stream(self) -> Stream:
        return self.changes.stream

    @property
    def bitmap_order(self) -> ByteOrder:
        return self.changes.bitmap_order

    @property
    def layouts(self) -> tuple[BlockLayout, ...]:
        return self.changes.layouts

    @property
    def changed_pages(self) -> int:
        """Pages that the increment has, those that became zero included."""
        return sum(block.changed_pages for block in self.blocks.values())

    def verify(self) -> None:
        """Check the structure of the increment and of its base. Raises SnapshotError; its message
        names the base if that is damaged."""
        self.changes.verify()
        changed = sum(block.changed_pages * block.page_size for block in self.blocks.values())
        if changed != self.header.changed_bytes:
            raise SnapshotError(
                f"{changed} bytes have their bits set, and the header counts "
                f"{self.header.changed_bytes}",
                field="changed_bytes",
            )
        try:
            self.base.verify()
        except SnapshotError as error:
            raise SnapshotError(f"the base {self.base.source.name!r}: {error}") from error

    def start_load(
        self,
        memories: Mapping[str, Memory],
        *,
        channels: int = 2,
        direct_io: DirectIO | str = DirectIO.AUTO,
        clear: Clear | str = Clear.ZERO,
        blocks: Collection[str] | None = None,
    ) -> Job[LoadReport]:
        check_mapping("memories", memories)
        check_names("blocks", blocks)
        chosen = [self.blocks[name] for name in self._known(blocks)]
        own: list[Bitmap] = []

        def drop() -> None:
            for bitmap in own:
                bitmap.close()

        try:
            for block in chosen:
                own.append(block.base_only())
            lower = [(block.base.layout, bits) for block, bits in zip(chosen, own, strict=True)]
            upper = [(block.layout, block.bitmap) for block in chosen]
            job = start_load_layers(
                [Layer(self.base.source, lower), Layer(self.source, upper)],
                memories,
                channels=channels,
                direct_io=direct_io,
                clear=clear,
            )
        except BaseException:
            drop()
            raise
        return self._follow(job.at_end(drop))

    def in_use(self) -> dict[FileId, str]:
        base = self.base.source
        files: list[tuple[Named, str]] = [
            (base.file_fd, f"the base of the increment that is read ({base.name!r})")
        ]
        if base.place is not None:
            what = f"the seal of the base of the increment that is read ({base.name!r})"
            files.append((seal_path(base.place), what))
        return files_in_use(files) | super().in_use()

    def _drop(self) -> None:
        for block in self._blocks.values():
            block._close()
        for snapshot in (self._changes, self._base):
            if snapshot is not None:
                snapshot.close()
        self._changes = self._base = None


def _specs(snapshot: MappedRamSnapshot) -> tuple[BlockSpec, ...]:
    return tuple(
        BlockSpec(block.name, block.length, block.page_size) for block in snapshot.blocks.values()
    )


def _open_base(increment: str, path: str | Path, header: IncrementHeader) -> MappedRamSnapshot:
    """Open the base at ``path`` and check that it is the one that ``header`` describes."""
    what = f"the base {str(path)!r} of the increment {increment!r}"
    _check_kind(path, what)
    try:
        stream_file = StreamFile.open(path)
    except TargetError as error:
        raise target_error(error, f"cannot open {what}{_ELSEWHERE}", path) from error
    except NotSupported as error:
        raise NotSupported(f"{what} cannot be used: {error}{_ELSEWHERE}") from error
    except SnapshotError as error:
        raise SnapshotError(f"{what} cannot be used: {error}") from error
    try:
        if stream_file.increment is not None:
            raise SnapshotError(
                f"{what} is an increment itself; increments refer to a whole snapshot, so that no "
                "chain of files has to be kept: name that one, or convert this base to mapped-ram"
                f"{_ELSEWHERE}"
            )
        if stream_file.source.forward or not _is_mapped_ram(stream_file, what):
            raise SnapshotError(f"{what} is not a mapped-ram file{_ELSEWHERE}")
        fd = stream_file.source.fd
        try:
            lock_file(fd, exclusive=False)
            found = identify_snapshot(stream_file.source.place or path, fd)
        except BlockingIOError as error:
            raise TargetError(
                errno.EBUSY, f"{what} is being written by another process", path
            ) from error
        except OSError as error:
            raise target_error(error, f"cannot read {what}", path) from error
        difference = header.base.differs_from(found)
        if difference is not None:
            raise SnapshotError(
                f"{what} is not the file that the increment was made from: {difference}{_ELSEWHERE}"
            )
        try:
            base = MappedRamSnapshot(stream_file)
        except SnapshotError as error:
            raise SnapshotError(f"{what} cannot be used: {error}") from error
        return _check_base(base, what, header)
    except BaseException:
        stream_file.close()
        raise


def _check_kind(path: str | Path, what: str) -> None:
    """Raise SnapshotError unless ``path`` is a regular file. An increment may name any path, and to
    open a device or a FIFO can have an effect by itself."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # opening it reports the error
    if not stat.S_ISREG(mode):
        raise SnapshotError(f"{what} is not a regular file{_ELSEWHERE}")


def _is_mapped_ram(stream_file: StreamFile, what: str) -> bool:
    try:
        return MAPPED_RAM in stream_file.configuration.capabilities
    except SnapshotError as error:
        raise SnapshotError(f"{what} cannot be used: {error}{_ELSEWHERE}") from error


def _check_base(base: MappedRamSnapshot, what: str, header: IncrementHeader) -> MappedRamSnapshot:
    same_machine = base.machine in ("", header.machine)
    if _specs(base) != header.blocks or not same_machine:
        raise SnapshotError(f"{what} is of another machine, or has other RAM blocks{_ELSEWHERE}")
    if any(block.external for block in base.blocks.values()):
        raise SnapshotError(f"{what} does not contain all of its blocks")
    return base
