"""Estimate how much a save writes, and measure how fast a directory takes it."""

from __future__ import annotations

import errno
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pyqmigrate.errors import PyqmigrateError, TargetError, target_error
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.output import OutputFile
from pyqmigrate.io.threads import starting_threads
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.sampling import count_data, extent_bytes, sample_memory

__all__ = ["Basis", "DiskRate", "Estimate", "estimate", "measure_rate"]

_COUNTED_MAX = 4 << 30  # bytes whose pages are all scanned, in about half a second
_UNIT = 1 << 20
_UNITS = 64


class Basis(StrEnum):
    """What an estimate is based on."""

    COUNTED = "counted"
    """Every page was scanned."""
    SAMPLED = "sampled"
    """Some pages were scanned."""
    BOUND = "bound"
    """Some memory cannot be read, so this is an upper bound."""


@dataclass(frozen=True)
class Estimate:
    """``data`` bytes of guest memory are in pages that are not zero."""

    data: int
    basis: Basis


def estimate(guest: GuestInfo, *, channels: int = 2) -> Estimate:
    """Estimate how much data the guest's memory holds. Unreadable memory counts in full.

    Up to 4 GiB of memory that may hold data are counted, more is sampled. The guest may keep
    running. Blocks for a second at most.
    """
    unseen = sum(block.length for block in guest.blocks if block.memory is None)
    basis = Basis.BOUND if unseen else Basis.COUNTED
    try:
        bound = extent_bytes(guest)
        sample = sample_memory(guest) if bound > _COUNTED_MAX else None
        if sample is None:
            return Estimate(unseen + count_data(guest, channels), basis)
    except PyqmigrateError:  # memory can no longer be read
        return Estimate(guest.total_ram, Basis.BOUND)
    return Estimate(unseen + min(bound, sample.data), Basis.BOUND if unseen else Basis.SAMPLED)


@dataclass(frozen=True)
class DiskRate:
    """The result of a short write into a directory. ``rate`` in bytes a second, 0 without space.

    ``free`` is in bytes, None if the file system has no limit; ``direct_io`` is whether direct I/O
    is possible, ``reason`` why or why not.
    """

    rate: float
    free: int | None
    direct_io: bool
    reason: str


def measure_rate(directory: Path, *, channels: int = 2) -> DiskRate:
    """Measure a durable write of up to 64 MiB into a file that never gets a name.

    No more than an eighth of the free space is used. Raises TargetError if the directory cannot be
    written to.
    """
    target = OutputFile.open(directory / "pyqmigrate-check", DirectIO.AUTO)
    try:
        free = target.free_bytes()
        units = _UNITS if free is None else min(_UNITS, free // 8 // _UNIT)
        with starting_threads():
            seconds = _write(target, units, channels) if units else 0.0
        rate = units * _UNIT / seconds if seconds else 0.0
        return DiskRate(rate, free, target.direct is not None, target.direct_io_reason)
    except TargetError:
        raise
    except OSError as error:
        raise target_error(error, "a short write to try the disk failed", directory) from error
    finally:
        target.abort()


def _write(target: OutputFile, units: int, channels: int) -> float:
    """Return the seconds until this many MiB are durable."""
    target.set_size(units * _UNIT)
    fd = target.fd if target.direct is None else target.direct.fd
    with mmap.mmap(-1, _UNIT) as data, ThreadPoolExecutor(channels) as pool:
        data[:] = os.urandom(_UNIT)  # incompressible
        start = time.monotonic()
        for done in pool.map(lambda unit: os.pwrite(fd, data, unit * _UNIT), range(units)):
            if done != _UNIT:
                raise OSError(errno.EIO, "short write")
        os.fdatasync(target.fd)
        return time.monotonic() - start
