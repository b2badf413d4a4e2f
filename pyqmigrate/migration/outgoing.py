"""One outgoing migration: its target, its passes, and what it costs the guest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from uuid import UUID

from pyqmigrate.errors import UsageError
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.memory import FileMemory, RamBlock
from pyqmigrate.io.target import DirectIO
from pyqmigrate.migration.fdset import FdSets
from pyqmigrate.migration.fdset_checks import Direction
from pyqmigrate.migration.rules import effective_direct_io
from pyqmigrate.migration.target import TakeFd, target_of
from pyqmigrate.qapi.address import Address
from pyqmigrate.qapi.capabilities import Capabilities
from pyqmigrate.qapi.parameters import Parameters, ZeroPageDetection
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.snapshot.load.sequential import SequentialWriter
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions, Sparse, StreamWriter

__all__ = ["Clock", "in_file", "open_writer", "selections"]


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
    uuid: UUID | None,
    resources: contextlib.ExitStack,
) -> StreamWriter:
    """Open the target of a migration. What is borrowed or taken goes back with ``resources``.

    Raises FdsetError, TargetError, NotSupported or UsageError.
    """
    direct = effective_direct_io(capabilities, parameters)
    target = target_of(
        address,
        Direction.SAVE,
        direct_io=direct,
        policy=policy,
        fdsets=fdsets,
        take_fd=take_fd,
        resources=resources,
    )
    told = uuid.bytes if uuid is not None and capabilities.validate_uuid else None
    shared = [block.name for block in blocks if in_file(block)]
    left_out = shared if capabilities.x_ignore_shared else None
    if not capabilities.mapped_ram:
        return SequentialWriter(
            target,
            blocks,
            SaveOptions(
                machine=machine,
                target_page_bits=target_page_bits,
                uuid=told,
                left_out=left_out,
                max_bandwidth=parameters.max_bandwidth,
            ),
        )
    all_pages = parameters.zero_page_detection is ZeroPageDetection.NONE
    return Writer(
        target,
        blocks,
        SaveOptions(
            direct_io=DirectIO.ON if direct else DirectIO.OFF,
            sparse=Sparse.DENSE if all_pages else Sparse.AUTO,
            mark_zero=all_pages,
            channels=parameters.multifd_channels if capabilities.multifd else 1,
            machine=machine,
            target_page_bits=target_page_bits,
            uuid=told,
            left_out=left_out,
            max_bandwidth=parameters.max_bandwidth,
        ),
    )


def in_file(block: RamBlock) -> bool:
    """Whether the block's memory is a file that others can have too: what x-ignore-shared skips."""
    return isinstance(block.memory, FileMemory)


def selections(
    dirty: Mapping[str, object], blocks: Sequence[RamBlock], pages: Sequence[int]
) -> list[Bitmap]:
    """The dirty bitmaps of a guest as selections of a pass, one for each block."""
    unknown = [name for name in dirty if name not in {block.name for block in blocks}]
    if unknown:
        raise UsageError(f"a dirty bitmap was given for {unknown[0]!r}, which is not a block")
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
