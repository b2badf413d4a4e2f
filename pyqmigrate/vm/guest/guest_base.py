"""The snapshot that a save of a guest is relative to.

A guest that was restored with mode ``instant`` maps the pages of its snapshot privately: the page
table of its QEMU shows what it changed. Other guests need the digests of a snapshot's pages
(``SNAPSHOT.pages``)::

    with GuestBase.find(guest, "auto") as base:
        base.ram.find_changed()                      # {"pc.ram": ChangedPages(...)}
        base.snapshot.blocks["pc.ram"].memory()      # what was there before
        base.check_unchanged()                       # before a save relative to it gets its name
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pyqmigrate.errors import NotSupported, SnapshotError, TargetError, UsageError, target_error
from pyqmigrate.format.libvirt import is_libvirt
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.io.companion_file import identify_snapshot
from pyqmigrate.io.in_use import FileId
from pyqmigrate.io.lock import lock_file
from pyqmigrate.io.place import resolve_symlink
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Descriptors, Target
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.vm.guest.changed_pages import RestoredBlock, RestoredRam
from pyqmigrate.vm.guest.disks import seen_here
from pyqmigrate.vm.guest.process import Mapping, covering, open_mapped, read_mappings

if TYPE_CHECKING:
    from pyqmigrate.io.page_digests import DigestTable
    from pyqmigrate.vm.guest.inspect import GuestBlock, GuestInfo

__all__ = ["AUTO", "BaseMark", "GuestBase"]

AUTO = "auto"
_HEAD = 16  # bytes, enough to recognize a snapshot
_DELETED = " (deleted)"
_WHOLE_MAX = 256 << 20  # bytes of blocks that are copied whole
_OTHERWISE = "save without a base (--live --method changed writes a whole snapshot, which can be the next base)"


@dataclass(frozen=True)
class BaseMark:
    """The file that a base was: its path, None if it has no name, its device and inode, and its size and
    time of modification."""

    path: Path | None
    file: FileId
    identity: SnapshotId

    def check(self, fd: int | None = None) -> None:
        """Raise SnapshotError if the path leads to another file by now, or the file was changed.

        ``fd`` is the open base; without it the file is opened by its path.
        """
        name = "" if self.path is None else f" {os.fspath(self.path)!r}"
        if self.path is not None:
            try:
                found = FileId.of(self.path.stat())
            except OSError:
                found = None
            if found != self.file:
                raise SnapshotError(f"the base{name} was replaced or removed during the save")
        if fd is not None:
            now = _identify(self.path, fd)
        elif self.path is not None:
            with self.path.open("rb") as file:
                now = _identify(self.path, file.fileno())
        else:
            return
        difference = self.identity.differs_from(now)
        if difference is not None:
            raise SnapshotError(f"the base{name} was changed during the save: {difference}")


class GuestBase:
    """An open, checked snapshot of the same machine. Close it.

    ``path`` is its absolute path, None if only its pages are needed and it has no name any more.
    ``ram`` has the blocks that the guest maps from it; None if it maps none, and ``tables`` are the
    digests of its pages then. ``whole`` are the blocks to copy whole.
    """

    def __init__(self, guest: GuestInfo, target: Target, path: Path | None) -> None:
        self.path = path
        self.ram: RestoredRam | None = None
        self.tables: dict[str, DigestTable] = {}
        self.whole: tuple[GuestBlock, ...] = ()
        self._guest = guest
        stream_file = StreamFile.open(target)
        try:
            self._lock(stream_file)
            self.snapshot = MappedRamSnapshot(stream_file)
        except BaseException:
            stream_file.close()
            raise
        try:
            self._check_layout()
            self.identity = _identify(path, self.snapshot.source.fd)
        except BaseException:
            self.close()
            raise

    @classmethod
    def find(cls, guest: GuestInfo, base: str | None) -> GuestBase:
        """Open the base of ``guest``: a path, or "auto" for the snapshot that its memory is mapped from.

        None is like "auto", but the snapshot may have been deleted. Blocks while the files are
        read. Raises NotSupported if the guest has no such base, UsageError if its memory is mapped
        from another file, SnapshotError if the base is damaged or of another machine, TargetError,
        GuestMemoryError.
        """
        mapped = _mapped_snapshot(guest)
        if base in (None, AUTO):
            if mapped is None:
                raise NotSupported(
                    "the guest was not restored with mode instant: no RAM block is a private mapping "
                    "of a snapshot"
                )
            self = cls._of_mapping(guest, mapped, named=base is not None)
        else:
            assert base is not None
            self = cls(guest, base, resolve_symlink(base))
        try:
            if mapped is not None:
                self._open_ram(mapped)
            else:
                self._read_digests()
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def _of_mapping(cls, guest: GuestInfo, mapping: Mapping, *, named: bool) -> GuestBase:
        assert guest.pid is not None
        try:
            fd = open_mapped(guest.pid, mapping)
        except OSError as error:
            raise target_error(
                error, "cannot open the snapshot that the guest runs from", mapping.path
            ) from error
        try:
            path = _name_of(guest.pid, mapping, fd) if named else None
            if path is not None:
                return cls(guest, os.fspath(path), path)
            if not named:
                return cls(guest, Descriptors(fd), None)
        finally:
            os.close(fd)
        raise SnapshotError(
            f"the snapshot that the guest runs from, {mapping.path.removesuffix(_DELETED)!r}, was "
            f"deleted, moved or replaced, or is a snapshot of a store: {_OTHERWISE}"
        )

    @property
    def blocks(self) -> dict[str, GuestBlock]:
        """The guest's blocks by name, in the order of the base."""
        known = {block.name: block for block in self._guest.blocks}
        return {name: known[name] for name in self.snapshot.blocks}

    @property
    def data_bytes(self) -> int:
        """Bytes of the base's pages that are not zero."""
        return sum(block.data_pages * block.page_size for block in self.snapshot.blocks.values())

    def check_unchanged(self) -> None:
        """Raise SnapshotError if the path leads to another file by now, or the file was changed."""
        self.mark.check(self.snapshot.source.fd)

    @property
    def mark(self) -> BaseMark:
        """The identity by which the base is recognized after it was closed."""
        return BaseMark(self.path, self.snapshot.identity, self.identity)

    def _lock(self, stream_file: StreamFile) -> None:
        source = stream_file.source
        if stream_file.source.forward:
            return  # refused as a snapshot
        try:
            lock_file(source.fd, exclusive=False)
        except BlockingIOError as error:
            raise TargetError(
                errno.EBUSY, "another process is changing the base", source.name
            ) from error

    def _check_layout(self) -> None:
        name = self.snapshot.source.name
        if self.snapshot.bitmap_order != sys.byteorder:
            raise NotSupported(f"the base {name!r} was written on a host of the other byte order")
        if self.snapshot.offset and self.snapshot.libvirt is None:
            raise UsageError(f"the stream of the base {name!r} must be at the start of the file")
        base = {block.name: block.length for block in self.snapshot.blocks.values()}
        guest = {block.name: block.length for block in self._guest.blocks}
        if base != guest:
            different = [
                block for block in {**base, **guest} if base.get(block) != guest.get(block)
            ]
            raise SnapshotError(
                f"the base {name!r} is not of this machine: RAM block {different[0]!r} has "
                f"{guest.get(different[0], 0)} bytes in the guest and {base.get(different[0], 0)} there"
            )
        for block in self._guest.blocks:
            if block.memory is None:
                raise NotSupported(
                    f"the memory of block {block.name!r} cannot be read: {block.why_not}"
                )
        page_bits = self._guest.target_page_bits
        for stored in self.snapshot.blocks.values():
            if stored.external:
                raise NotSupported(
                    f"the content of block {stored.name!r} is not in the base {name!r}"
                )
            if page_bits is not None and stored.page_size != 1 << page_bits:
                raise SnapshotError(
                    f"the base {name!r} has pages of {stored.page_size} bytes, the guest of "
                    f"{1 << page_bits}"
                )
        if self.snapshot.machine not in ("", self._guest.machine):
            raise SnapshotError(
                f"the base {name!r} is of machine {self.snapshot.machine!r}, the guest of "
                f"{self._guest.machine!r}"
            )

    def _open_ram(self, mapping: Mapping) -> None:
        """Find the blocks that are mapped from the same file, and prove that they are the base's."""
        assert self._guest.pid is not None
        space = read_mappings(self._guest.pid)
        mapped = []
        for block in self._guest.blocks:
            found = _file_of(space, block)
            if found is not None and (found.device, found.inode) == (mapping.device, mapping.inode):
                mapped.append(block)
        self.ram = RestoredRam(
            self._guest.pid,
            [
                RestoredBlock(
                    block.name,
                    block.host_address,
                    block.length,
                    self.snapshot.blocks[block.name].pages_offset,
                    self.snapshot.blocks[block.name].page_size,
                )
                for block in mapped
            ],
        )
        self.ram.check(self.snapshot.source.fd)
        names = {block.name for block in mapped}
        self._set_whole([block for block in self._guest.blocks if block.name not in names])

    def _read_digests(self) -> None:
        from pyqmigrate.io.page_table_file import page_table_path, read_page_table

        assert self.path is not None
        place = page_table_path(self.path)
        specs = [
            BlockSpec(block.name, block.length, block.page_size)
            for block in self.snapshot.blocks.values()
        ]
        table = read_page_table(place, specs)
        if table is None:
            raise NotSupported(
                "the guest does not map the base (it was not restored from it with mode instant), and "
                f"there are no digests of its pages: {os.fspath(place)!r} (--keep-digests) does not "
                "exist"
            )
        self.tables = table.tables
        difference = table.snapshot.differs_from(self.identity)
        if difference is not None:
            raise SnapshotError(
                f"the digests {os.fspath(place)!r} are not of this base: {difference}"
            )
        # A restore maps memory backends from the base.
        self._set_whole([block for block in self._guest.blocks if not block.backend])

    def _set_whole(self, blocks: Sequence[GuestBlock]) -> None:
        size = sum(block.length for block in blocks)
        if size > _WHOLE_MAX:
            raise NotSupported(
                f"{size >> 20} MiB of memory are not mapped from the base: {blocks[0].name!r} and others"
            )
        self.whole = tuple(blocks)

    def close(self) -> None:
        """Close it. Idempotent."""
        self.snapshot.close()
        if self.ram is not None:
            self.ram.close()
        for table in self.tables.values():
            table.close()
        self.tables = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mapped_snapshot(guest: GuestInfo) -> Mapping | None:
    """Return a mapping of the snapshot that the longest block is mapped from; None without one."""
    if guest.pid is None:
        raise NotSupported("the process of this QEMU is unknown, so its memory cannot be looked at")
    try:
        space = read_mappings(guest.pid)
    except OSError as error:
        raise NotSupported(
            f"/proc/{guest.pid}/maps cannot be read ({error.strerror}): run as the user of QEMU, or as "
            "root (CAP_SYS_PTRACE)"
        ) from error
    for block in sorted(guest.blocks, key=lambda block: -block.length):
        mapping = _file_of(space, block)
        if mapping is not None and _is_snapshot(guest.pid, mapping):
            return mapping
    return None


def _file_of(space: Sequence[Mapping], block: GuestBlock) -> Mapping | None:
    """Return the first mapping of a block that is a private mapping of a file; None for others."""
    pieces = covering(space, block.host_address, block.length)
    if not pieces or any(piece.shared or not piece.inode for piece in pieces):
        return None
    return pieces[0]


def _is_snapshot(pid: int, mapping: Mapping) -> bool:
    try:
        fd = open_mapped(pid, mapping)
    except OSError:
        return mapping.path != ""  # the error is reported when it is opened again
    try:
        head = os.pread(fd, _HEAD, 0)
    finally:
        os.close(fd)
    return head.startswith(MAGIC) or is_libvirt(head)


def _identify(path: Path | None, fd: int) -> SnapshotId:
    if path is None:
        info = os.fstat(fd)
        return SnapshotId(info.st_size, info.st_mtime_ns)
    return identify_snapshot(path, fd)


def _name_of(pid: int, mapping: Mapping, fd: int) -> Path | None:
    """Return a path that leads to the mapped file; None if none does."""
    if mapping.path.endswith(_DELETED):
        return None
    for path in (Path(mapping.path), seen_here(pid, mapping.path)):
        if _leads_to(path, fd):
            return path
    return None


def _leads_to(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except OSError:
        return False
