"""The main job: guest memory to a snapshot, with or without a seal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict, Unpack

from pyqmigrate.argument_types import check, check_callback
from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import UsageError
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.io.channels import check_channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.io.place import seal_path
from pyqmigrate.io.target import Descriptors, Target, stream_offset, target_path
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport, Sparse

if TYPE_CHECKING:
    from pyqmigrate.integrity.save_seal import SaveSeal

__all__ = ["StartSaveOptions", "save", "start_save"]


class StartSaveOptions(TypedDict, total=False):
    """The options of :func:`save` that are those of :func:`start_save`, which documents them."""

    channels: int
    direct_io: DirectIO | str
    sparse: Sparse | str
    machine: str
    target_page_bits: int | None
    reuse: bool
    max_bandwidth: int
    seal: Algorithm | str | None


def save(
    target: Target,
    blocks: Sequence[RamBlock],
    *,
    progress: Callable[[Progress], object] | None = None,
    **options: Unpack[StartSaveOptions],
) -> SaveReport:
    """Save guest memory to a snapshot and wait until it is durable.

    Like :func:`start_save`, with the same options and ``progress``, which is called on this thread
    at most ten times per second, and once after the end. If the wait is interrupted, or ``progress``
    raises before the end, the save is cancelled and leaves no file.
    """
    check_callback("progress", progress)
    return start_save(target, blocks, **options).wait(progress)


def start_save(
    target: Target,
    blocks: Sequence[RamBlock],
    *,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    sparse: Sparse | str = Sparse.AUTO,
    machine: str = "",
    target_page_bits: int | None = None,
    reuse: bool = False,
    max_bandwidth: int = 0,
    seal: Algorithm | str | None = None,
) -> Job[SaveReport]:
    """Start to save guest memory, and return at once.

    target: a path, a ``file:PATH[,offset=SIZE]`` URI, or Descriptors. A path without an offset
        gets its name only when the snapshot is complete and durable.
    blocks: the RAM blocks, in the order of the file. The memory must not change until the job has
        ended.
    channels: threads that move pages, 1 to 255.
    machine: the machine type; an empty one loads on any machine.
    target_page_bits: for targets that expect it (ARM with 4 KiB pages: 12).
    reuse: overwrite the allocated blocks of the target in place, which is about twice as fast. The
        old content is lost from the start, and zero pages may have old bytes under their clear bits.
    max_bandwidth: bytes per second over all channels; 0 means unlimited.
    seal: an :class:`~pyqmigrate.format.digest.Algorithm`: write a seal of the written bytes beside the
        path, once the snapshot has its name. If that fails, the snapshot stays. Descriptors, which
        have no path, and another file at the seal's path raise UsageError.

    Raises UsageError for bad arguments, NotSupported for a digest whose library is missing,
    TargetError (NoSpace, DirectIORefused) if the system refuses. The job's result raises these too,
    GuestMemoryError if the memory disappears, and Cancelled.
    """
    check("machine", machine, str)
    check("target_page_bits", target_page_bits, int, type(None))
    check("reuse", reuse, bool)
    algorithm = None if seal is None else parse_enum(Algorithm, seal, "seal")
    observer = None if algorithm is None else _seal_beside(target, algorithm)
    writer = Writer(
        target,
        blocks,
        SaveOptions(
            direct_io=parse_enum(DirectIO, direct_io, "direct_io"),
            sparse=parse_enum(Sparse, sparse, "sparse"),
            channels=check_channels(channels),
            machine=machine,
            target_page_bits=target_page_bits,
            reuse=reuse,
            max_bandwidth=max_bandwidth,
        ),
        observer,
    )
    try:
        return Job(writer.channels, writer.total, lambda: replace(writer.run(), seal=algorithm))
    except BaseException:
        writer.close()
        raise


def _seal_beside(target: Target, algorithm: Algorithm) -> SaveSeal:
    if isinstance(target, Descriptors):
        raise UsageError("a seal needs a path to be written beside; descriptors have none")
    # Most saves write none.
    from pyqmigrate.integrity.manifest import check_place
    from pyqmigrate.integrity.save_seal import SaveSeal

    place = check_place(seal_path(target_path(target)))
    return SaveSeal(algorithm, stream_offset(target), place)
