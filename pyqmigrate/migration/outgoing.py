"""One outgoing migration: its target, its passes, and what it costs the guest."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.fdset import FdSets, is_fdset_name
from pyqmigrate.format.address import Address, Transport
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.target import Descriptors, DirectIO
from pyqmigrate.options import Capabilities, Parameters, Policy, ZeroPageDetection
from pyqmigrate.options.rules import effective_direct_io
from pyqmigrate.save import SaveReport, Sparse, Writer
from pyqmigrate.sequential import SequentialWriter

__all__ = ["PassWriter", "TakeFd", "open_writer", "selections"]

TakeFd = Callable[[str], int]


class PassWriter(Protocol):
    """What writes the stream: mapped-ram or sequential."""

    channels: Channels

    @property
    def total(self) -> int: ...
    def begin(self) -> None: ...
    def write_pages(self, selections: Sequence[Bitmap] | None = None) -> None: ...
    def clean(self) -> int: ...
    def finish(
        self, sections: bytes = b"", description: bytes | None = None, *,
        switchover_start: bool = False,
    ) -> SaveReport: ...
    def close(self) -> None: ...


def open_writer(
    address: Address,
    blocks: Sequence[RamBlock],
    capabilities: Capabilities,
    parameters: Parameters,
    *,
    policy: Policy,
    fdsets: FdSets,
    take_fd: TakeFd,
    machine: str,
    target_page_bits: int | None,
    resources: contextlib.ExitStack,
) -> PassWriter:
    """Open the target of a migration. What is borrowed or taken goes back with ``resources``.

    Raises FdsetError, TargetError or UsageError.
    """
    direct = effective_direct_io(capabilities, parameters)
    target = _target(address, direct, policy, fdsets, take_fd, resources)
    if not capabilities.mapped_ram:
        return SequentialWriter(
            target, blocks, machine=machine, target_page_bits=target_page_bits,
            max_bandwidth=parameters.max_bandwidth,
        )
    all_pages = parameters.zero_page_detection is ZeroPageDetection.NONE
    return Writer(
        target, blocks,
        direct_io=DirectIO.ON if direct else DirectIO.OFF,
        sparse=Sparse.DENSE if all_pages else Sparse.AUTO,
        mark_zero=all_pages,
        channels=parameters.multifd_channels if capabilities.multifd else 1,
        machine=machine, target_page_bits=target_page_bits,
        max_bandwidth=parameters.max_bandwidth,
    )


def _target(
    address: Address, direct: bool, policy: Policy, fdsets: FdSets, take_fd: TakeFd,
    resources: contextlib.ExitStack,
) -> str | Descriptors:
    if address.transport is Transport.FD:
        fd = take_fd(address.path)
        resources.callback(os.close, fd)
        return Descriptors(fd, offset=_position(fd))
    if address.transport is not Transport.FILE:
        raise NotSupported(f"migration over {address.transport} is not possible here, only files")
    if not is_fdset_name(address.path):
        return f"file:{address.path},offset={address.offset}"
    plain = resources.enter_context(fdsets.open(address.path, os.O_WRONLY | os.O_CREAT)).fileno()
    with_direct = None
    if direct:
        with_direct = resources.enter_context(
            fdsets.open(address.path, os.O_WRONLY | os.O_DIRECT)
        ).fileno()
    offset = address.offset
    if offset == 0 and policy is Policy.COMPAT:
        offset = _position(plain)  # QEMU seeks only to an offset that is not 0
    return Descriptors(plain, with_direct, offset)


def _position(fd: int) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        raise UsageError(f"descriptor {fd} is not a file: {error.strerror}") from error


def selections(
    dirty: Mapping[str, object], blocks: Sequence[RamBlock], pages: Sequence[int]
) -> list[Bitmap]:
    """The dirty bitmaps of a guest as selections of a pass, one for each block."""
    unknown = [name for name in dirty if name not in {block.name for block in blocks}]
    if unknown:
        raise UsageError(f"a dirty bitmap was given for {unknown[0]!r}, which is no block")
    chosen: list[Bitmap] = []
    for block, npages in zip(blocks, pages, strict=True):
        bitmap = Bitmap(npages)
        chosen.append(bitmap)
        given = dirty.get(block.name)
        if given is not None:
            bitmap.fill(memoryview(given).cast("B"))  # type: ignore[arg-type]
    return chosen


class Clock:
    """Times of one migration, in milliseconds."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.setup = 0
        self.total = 0
        self.downtime = 0
        self._stopped: float | None = None

    def running(self) -> int:
        """Since the start."""
        return round((time.monotonic() - self._start) * 1000)

    def set_up(self) -> None:
        self.setup = self.running()

    def stopped(self) -> None:
        self._stopped = time.monotonic()

    def ended(self) -> None:
        self.total = self.running()
        if self._stopped is not None:
            self.downtime = round((time.monotonic() - self._stopped) * 1000)
