"""The snapshot of a restore: opened and checked once, for one guest or many."""

from __future__ import annotations

import errno
import os
import sys
import time
from dataclasses import dataclass

from pyqmigrate.errors import DirectIORefused, NotSupported, TargetError
from pyqmigrate.io.channels import check_channels
from pyqmigrate.io.direct_io import Direct, DirectIO
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.lock import lock_file
from pyqmigrate.io.page_cache import cached_bytes
from pyqmigrate.io.place import seal_path
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot

__all__ = ["Reading", "RestoreSource"]

_WARM = 0.5  # share of the file in the page cache from which direct I/O is slower
_COLD_CHANNELS = 32  # QEMU has one direct read in flight for each
_WARM_CHANNELS = 4


@dataclass(frozen=True)
class Reading:
    """How QEMU shall read the whole file: channels, the direct descriptor if any, and why."""

    channels: int
    direct: Direct | None
    why: str


class RestoreSource:
    """An open, verified snapshot. Close it.

    ``place`` is its absolute path, None for a descriptor. ``was_running`` is from libvirt's header:
    libvirt pauses a guest before it saves it. ``fd`` carries a shared lock (flock), which a process
    that inherits it keeps: the file must not change in place while memory is mapped from it.
    """

    def __init__(self, target: Target, offset: int | None) -> None:
        self._input = InputFile(target)
        self.name, self.place = self._input.name, self._input.place
        try:
            self._lock()
        except BaseException:
            self._input.close()
            raise
        stream_file = StreamFile.find(self._input, offset)
        self.was_running = stream_file.libvirt is not None and stream_file.libvirt.was_running
        self.snapshot = MappedRamSnapshot(stream_file)
        try:
            self.snapshot.verify()
            if self.snapshot.stream.background:
                raise NotSupported(
                    "QEMU wrote this background snapshot without bitmaps, and would load zeros: "
                    "convert it to mapped-ram first (pyqmigrate convert --to mapped-ram)"
                )
            if self.snapshot.bitmap_order != sys.byteorder:
                raise NotSupported(
                    f"a {self.snapshot.bitmap_order}-endian host wrote this file, and QEMU reads "
                    "its bitmaps in this host's order: convert it to mapped-ram here first"
                )
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        return self._input.fd

    @property
    def age(self) -> float:
        """Seconds since the file was written."""
        return max(time.time() - os.fstat(self.fd).st_mtime, 0.0)

    def close(self) -> None:
        """Close it. Idempotent."""
        self.snapshot.close()

    def _lock(self) -> None:
        if self._input.is_duplicate:
            return  # it would replace a lock that the caller may have
        try:
            lock_file(self.fd, exclusive=False)
        except BlockingIOError as error:
            raise TargetError(
                errno.EBUSY, "another process is writing the snapshot in place", self.name
            ) from error

    def clear_pages_are_zero(self) -> bool:
        """Whether a seal of the file as it is now says that its clear pages are zeros."""
        # The name of the seal may be too long, for which Path.exists() would raise.
        if self.place is None or not os.path.exists(seal_path(self.place)):  # noqa: PTH110
            return False
        # Most snapshots have no seal, and a restore has no time for a module that it does not need.
        from pyqmigrate.integrity.seal import current_seal

        seal = current_seal(self.place, self.fd)
        return (
            seal is not None
            and seal.clear_pages_zero
            and seal.head.bitmap_order == self.snapshot.bitmap_order
        )

    def choose_reading(self, channels: int | None, direct_io: DirectIO) -> Reading:
        """Choose the fastest way for QEMU to read this file now. Blocks for a moment.

        Pass the result to :meth:`close_reading`. Raises DirectIORefused if direct I/O is required
        but not available.
        """
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
            for block in self.snapshot.blocks.values()
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
