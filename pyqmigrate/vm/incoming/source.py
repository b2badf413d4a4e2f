"""The snapshot of a restore: opened and checked once, for one guest or many.

The memory of a guest is mapped from the snapshot itself; of an increment, from its base.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pyqmigrate.errors import DirectIORefused, NotSupported, TargetError, UsageError
from pyqmigrate.format.stream.configuration import MAPPED_RAM
from pyqmigrate.format.suffixes import WORKING_SET
from pyqmigrate.io.channels import check_channels
from pyqmigrate.io.direct_io import Direct, DirectIO
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.lock import lock_file
from pyqmigrate.io.page_cache import cached_bytes
from pyqmigrate.io.place import resolve_symlink, seal_path
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.vm.incoming.ram_mapping import Mapped, map_blocks
from pyqmigrate.vm.qemu.command_line import CommandLine

if TYPE_CHECKING:
    from pyqmigrate.format.snapshot_id import SnapshotId
    from pyqmigrate.io.working_set_file import RecordedWorkingSet
    from pyqmigrate.snapshot.increment import IncrementBlock, IncrementSnapshot
    from pyqmigrate.vm.incoming.prefetch import Prefetch

__all__ = ["Reading", "RestoreSource", "map_source"]

_WARM = 0.5  # share of the file in the page cache from which direct I/O is slower
# QEMU has one direct read in flight for each, and zeroes the memory for it beforehand: with more of them
# than the disk serves at once, that is done while the disk works.
_COLD_CHANNELS = 128
_WARM_CHANNELS = 4


class Reading(NamedTuple):
    """How QEMU shall read the whole file: channels, the direct descriptor if any, and why."""

    channels: int
    direct: Direct | None
    why: str


def map_source(command: CommandLine, source: RestoreSource) -> Mapped:
    """Return a command line that maps every block possible from the mapped file of ``source``.

    Raises NotSupported with the reason if that is not possible, or if it would leave a block out of
    which an increment has only the changed pages; UsageError for an invalid command line.
    """
    mapped = map_blocks(command, source.mapped, source.mapped_fd)
    if source.increment is not None:
        for block in source.increment.blocks.values():
            if block.name not in mapped.blocks and _needs_base(block):
                raise NotSupported(
                    f"the increment has only the changed pages of block {block.name!r}, and this "
                    "command line does not map it"
                )
    return mapped


def _needs_base(block: IncrementBlock) -> bool:
    """Return whether pages of the block are not zero, but only in the base."""
    base_only = block.base_only()
    try:
        return base_only.count() > 0
    finally:
        base_only.close()


def _is_sequential(stream_file: StreamFile) -> bool:
    try:
        return MAPPED_RAM not in stream_file.configuration.capabilities
    except BaseException:
        stream_file.close()
        raise


def _open_increment(
    stream_file: StreamFile, base: str | os.PathLike[str] | None
) -> IncrementSnapshot | None:
    """Return the increment in an open file, with its base; None for another snapshot."""
    if stream_file.increment is not None:
        # A restore has no time for a module that it does not need.
        from pyqmigrate.snapshot.increment import IncrementSnapshot

        return IncrementSnapshot(stream_file, base=base)
    if base is not None:
        stream_file.close()
        raise UsageError(
            f"{stream_file.source.name!r} is not an increment, and has no base: leave base out"
        )
    return None


class RestoreSource:
    """An open, verified snapshot. Close it.

    ``place`` is its absolute path, None for a descriptor. ``view`` shows a snapshot of a store, whose
    ``place`` is only for reading; None for a file. ``was_running`` is from libvirt's header:
    libvirt pauses a guest before it saves it. ``snapshot`` is what QEMU loads; of an increment, its
    own stream alone. ``increment`` is the increment with its base, or None.

    Memory is mapped from ``mapped``: the snapshot, or the base of an increment. ``mapped_fd`` is its
    file, with a shared lock (flock), which a process that inherits it keeps: the file must not
    change in place while memory is mapped from it. A sequential stream can only be restored lazily:
    ``mapped`` raises NotSupported then.

    base: the path of an increment's base, instead of the recorded one. UsageError for another
        snapshot.
    cache: where the packs of a remote store are kept; None is the default directory.
    record: whether what is read of a snapshot of a store is noted, for a working set.
    ahead: whether its recorded working set is read ahead from the start, for an instant restore.
    pages: whether pages are read, or mapped; of a snapshot of a store a lazy restore leaves them to its
        page server.
    input_file: the target, opened with these options; it is taken over.
    """

    def __init__(
        self,
        target: Target,
        offset: int | None,
        base: str | os.PathLike[str] | None = None,
        cache: Path | None = None,
        record: bool = False,
        ahead: bool = False,
        pages: bool = True,
        input_file: InputFile | None = None,
    ) -> None:
        self._target = target
        self._prefetch: Prefetch | None = None
        self._prefetch_lock = threading.Lock()
        self._input = input_file or InputFile(
            target, cache=cache, record=record, ahead=ahead, pages=pages
        )
        self.name, self.place = self._input.name, self._input.place
        self.view = self._input.view
        try:
            self._lock()
        except BaseException:
            self._input.close()
            raise
        stream_file = StreamFile.find(self._input, offset)
        self.was_running = stream_file.libvirt is not None and stream_file.libvirt.was_running
        self.increment = _open_increment(stream_file, base)
        self._base: MappedRamSnapshot | None = None
        self.snapshot: Snapshot
        if self.increment is not None:
            self.snapshot, self._base = self.increment.changes, self.increment.base
        elif _is_sequential(stream_file):
            # A restore has no time for a module that it does not need.
            from pyqmigrate.snapshot.detect import snapshot_of

            self.snapshot = snapshot_of(stream_file)
        else:
            self.snapshot = self._base = MappedRamSnapshot(stream_file)
        try:
            (self.increment or self.snapshot).verify()
            for snapshot in () if self._base is None else (self.loaded, self._base):
                if snapshot.stream.background:
                    raise NotSupported(
                        "QEMU wrote this background snapshot without bitmaps, and would load zeros: "
                        "convert it to mapped-ram first (pyqmigrate convert --to mapped-ram)"
                    )
                if snapshot.bitmap_order != sys.byteorder:
                    raise NotSupported(
                        f"a {snapshot.bitmap_order}-endian host wrote {snapshot.source.name!r}, and "
                        "QEMU reads its bitmaps in this host's order: convert it to mapped-ram here "
                        "first"
                    )
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        return self._input.fd

    @property
    def mapped(self) -> MappedRamSnapshot:
        """What memory is mapped from. Raises NotSupported for a sequential stream."""
        if self._base is None:
            raise self._sequential()
        return self._base

    @property
    def loaded(self) -> MappedRamSnapshot:
        """``snapshot``, as QEMU can load it. Raises NotSupported for a sequential stream."""
        if not isinstance(self.snapshot, MappedRamSnapshot):
            raise self._sequential()
        return self.snapshot

    def _sequential(self) -> NotSupported:
        return NotSupported(
            f"{self.name!r} is a sequential stream: restore it in mode lazy, or convert it first "
            "(pyqmigrate convert --to mapped-ram)"
        )

    @property
    def pages_from(self) -> Snapshot:
        """Where most pages come from: the snapshot, or the base of an increment."""
        return self._base or self.snapshot

    @property
    def mapped_fd(self) -> int:
        return self.pages_from.source.fd

    @property
    def server_target(self) -> str:
        """What a page server, which has another working directory, opens; empty for the first of
        :attr:`kept_files`."""
        if self.view is not None and isinstance(self._target, str | os.PathLike):
            target = os.fspath(self._target)
            return target if "://" in target else os.path.abspath(target)
        return "" if self.place is None else os.fspath(self.place)

    @property
    def kept_files(self) -> list[tuple[str, int]]:
        """The files by their absolute paths, with descriptors, so that they stay the same ones; none of
        a snapshot that is read through a view. The path of a descriptor is empty."""
        if self.view is not None:
            return []
        sources = [self.snapshot.source]
        if self.increment is not None:
            sources.append(self.increment.base.source)
        return [(os.fspath(source.place or ""), source.file_fd) for source in sources]

    @property
    def age(self) -> float:
        """Seconds since the file was written."""
        return max(time.time() - os.fstat(self.fd).st_mtime, 0.0)

    def close(self) -> None:
        """Close it. Idempotent."""
        (self.increment or self.snapshot).close()

    def _lock(self) -> None:
        if self._input.is_duplicate:
            return  # it would replace a lock that the caller may have
        try:
            lock_file(self.fd, exclusive=False)
        except BlockingIOError as error:
            raise TargetError(
                errno.EBUSY, "another process is writing the snapshot in place", self.name
            ) from error

    def prefetch(self) -> Prefetch | None:
        """Start to read the recorded working set ahead, unless that was started; None without one.

        Returns at once, and raises nothing.
        """
        with self._prefetch_lock:
            if self._prefetch is None:
                self._prefetch = self._start_prefetch()
            return self._prefetch

    @property
    def records_requests(self) -> bool:
        """Whether a working set is recorded by what is read of the snapshot, which a view knows."""
        return self.view is not None and self.view.view.pushes and self.increment is None

    @property
    def started_prefetch(self) -> Prefetch | None:
        """The prefetch, if :meth:`prefetch` has started one."""
        return self._prefetch

    def fetch_rest(self) -> None:
        """Have all of the snapshot fetched from a remote store in the background. Raises TargetError."""
        view = self.pages_from.source.view
        if view is not None:
            view.view.fetch_rest()

    def cancel_prefetch(self) -> None:
        """Read no more of the working set ahead, if that was started."""
        with self._prefetch_lock:
            if self._prefetch is not None:
                self._prefetch.cancel()

    def _start_prefetch(self) -> Prefetch | None:
        path = self._working_set_path()
        if path is None or not os.path.lexists(path):
            return None
        from pyqmigrate.vm.incoming.prefetch import Prefetch

        layouts = {layout.name: layout for layout in self.mapped.layouts}
        try:
            identity = self.identify()
        except (OSError, UsageError):
            return None

        def read() -> RecordedWorkingSet:
            from pyqmigrate.io.working_set_file import read_current_working_set

            return read_current_working_set(path, identity)

        view = self.mapped.source.view
        push = view.view.push if view is not None and view.view.pushes else None
        return Prefetch(self.mapped_fd, layouts, read, push=push)

    def _working_set_path(self) -> str | None:
        if self.place is None:
            return None
        try:
            return os.fspath(resolve_symlink(self.place)) + WORKING_SET
        except TargetError:
            return None

    def identify(self) -> SnapshotId:
        """Return the identity of the open file. Raises UsageError for a descriptor, OSError."""
        from pyqmigrate.io.companion_file import identify_snapshot

        if self.place is None:
            raise UsageError("the snapshot is a descriptor, which has no name")
        return identify_snapshot(self.place, self.fd)

    def clear_pages_are_zero(self) -> bool:
        """Whether a seal of the mapped file as it is now says that its clear pages are zeros."""
        place = self.mapped.source.place
        # The name of the seal may be too long, for which Path.exists() would raise.
        if place is None or not os.path.exists(seal_path(place)):
            return False
        # Most snapshots have no seal, and a restore has no time for a module that it does not need.
        from pyqmigrate.integrity.verify import current_seal

        seal = current_seal(place, self.mapped_fd)
        return (
            seal is not None
            and seal.clear_pages_zero
            and seal.head.bitmap_order == self.mapped.bitmap_order
        )

    def choose_reading(self, channels: int | None, direct_io: DirectIO) -> Reading:
        """Choose the fastest way for QEMU to read this file now. Blocks for a moment.

        Pass the result to :meth:`close_reading`. Raises DirectIORefused if direct I/O is required
        but not available.
        """
        _ = self.loaded
        if channels is not None:
            check_channels(channels)
        direct, why = None, "direct I/O is switched off"
        cached = 0.0
        if direct_io is DirectIO.AUTO:
            cached = cached_bytes(self.fd) / max(self.snapshot.allocated, 1)
            why = f"{min(cached, 1):.0%} of the file is in the page cache"
        if cached < _WARM and direct_io is not DirectIO.OFF:
            direct, why = self._input.open_direct(direct_io)
            direct, why = self._check_alignment(direct, why, direct_io)
        chosen = _COLD_CHANNELS if direct else _WARM_CHANNELS
        return Reading(chosen if channels is None else channels, direct, why)

    def _check_alignment(
        self, direct: Direct | None, why: str, setting: DirectIO
    ) -> tuple[Direct | None, str]:
        """Close ``direct`` if the disk cannot read single pages, as QEMU does."""
        if direct is None or all(
            block.page_size % direct.off_align == 0 and block.pages_offset % direct.off_align == 0
            for block in self.loaded.blocks.values()
        ):
            return direct, why
        alignment = direct.off_align
        self._input.close_direct(direct)
        why = f"the pages are not aligned to {alignment} bytes, as the disk requires"
        if setting is DirectIO.ON:
            raise DirectIORefused(errno.EINVAL, f"no direct I/O: {why}", self.name)
        return None, why

    def close_reading(self, reading: Reading) -> None:
        self._input.close_direct(reading.direct)

    def open_again(self) -> int:
        """Return a descriptor with its own position, at the start; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The capabilities that the stream names; QEMU needs the same ones."""
        return self.snapshot.stream.capabilities
