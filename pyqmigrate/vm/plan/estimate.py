"""How much a save will have to write, and how fast a directory takes it."""

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
from pyqmigrate.vm.plan.sampling import count_data, extent_bytes, sample

__all__ = ["Basis", "DiskRate", "Estimate", "estimate", "measure_rate"]

_COUNTED = 4 << 30  # bytes that are looked at one by one, in about half a second
_UNIT = 1 << 20
_UNITS = 64


class Basis(StrEnum):
    """What an estimate rests on."""

    COUNTED = "counted"
    """Every page was looked at."""
    SAMPLED = "sampled"
    """Some pages were looked at."""
    BOUND = "bound"
    """Not all of the memory can be read from here: it may be less."""


@dataclass(frozen=True)
class Estimate:
    """``data`` bytes of guest memory are in pages that are not zero."""

    data: int
    basis: Basis


def estimate(guest: GuestInfo, *, channels: int = 2) -> Estimate:
    """How much data the guest's memory holds. Memory out of reach counts in full.

    Up to 4 GiB of memory that may hold data are counted, more is sampled. The guest may run
    meanwhile. Blocks, for a second at most.
    """
    unseen = sum(block.length for block in guest.blocks if block.memory is None)
    basis = Basis.BOUND if unseen else Basis.COUNTED
    try:
        bound = extent_bytes(guest)
        found = sample(guest) if bound > _COUNTED else None
        if found is None:
            return Estimate(unseen + count_data(guest, channels), basis)
    except PyqmigrateError:  # memory went away
        return Estimate(guest.total_ram, Basis.BOUND)
    return Estimate(unseen + min(bound, found.data), Basis.BOUND if unseen else Basis.SAMPLED)


@dataclass(frozen=True)
class DiskRate:
    """What a short write into a directory showed. ``rate`` in bytes a second, 0 without room.

    ``free`` bytes are there, None where the file system knows no limit; ``direct_io`` tells
    whether pages can go past the page cache, ``reason`` why or why not.
    """

    rate: float
    free: int | None
    direct_io: bool
    reason: str


def measure_rate(directory: Path, *, channels: int = 2) -> DiskRate:
    """Write up to 64 MiB into a file that never gets a name, and make them durable.

    No more than an eighth of the free space is used. Raises TargetError where the directory cannot
    be written to.
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
    """Seconds for this many MiB, until they are durable."""
    target.set_size(units * _UNIT)
    fd = target.fd if target.direct is None else target.direct.fd
    with mmap.mmap(-1, _UNIT) as data, ThreadPoolExecutor(channels) as pool:
        data[:] = os.urandom(_UNIT)  # nothing that a file system could compress
        start = time.monotonic()
        for done in pool.map(lambda unit: os.pwrite(fd, data, unit * _UNIT), range(units)):
            if done != _UNIT:
                raise OSError(errno.EIO, "short write")
        os.fdatasync(target.fd)
        return time.monotonic() - start
