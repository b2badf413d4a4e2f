"""Convert a snapshot: to a sequential stream, mapped-ram file, raw files, ELF core, LiME file, save
image of libvirt's.

    convert("/old/guest.sequential", "/snap/guest.mapped", to="mapped-ram")

The two stream forms are written by the writers of a save, straight from the source: a mapped-ram
file by all channels with direct I/O, with zero pages as holes. A sequential stream is read once,
front to back, into a mapped-ram file or raw files (:mod:`pyqmigrate.snapshot.load.staging`); other
targets read its pages in another order, which takes a pass for an index first
(:mod:`pyqmigrate.snapshot.sequential`). Everything that is not RAM (device sections, elements between
RAM's parts) is copied byte for byte, and so are machine type, page bits and uuid; QEMU loads the
result like the source. The description is copied too, except for the configuration that it
describes.

The other forms have a module each: :mod:`~pyqmigrate.export.raw`, :mod:`~pyqmigrate.export.elf`,
:mod:`~pyqmigrate.export.lime`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypedDict, Unpack, overload

from pyqmigrate.argument_types import check, check_callback, check_mapping
from pyqmigrate.core import MemorySource
from pyqmigrate.enums import Format, parse_enum
from pyqmigrate.errors import GuestMemoryError, NotSupported, UsageError
from pyqmigrate.export.carried import Carried, carried_of, sections_before
from pyqmigrate.export.elf import write_elf
from pyqmigrate.export.image import ImageReport
from pyqmigrate.export.libvirt import image_header
from pyqmigrate.export.lime import write_lime
from pyqmigrate.export.raw import RawReport, unpack
from pyqmigrate.format.address_space.placement import GivenPlacement
from pyqmigrate.io.block_index import BlockIndex
from pyqmigrate.io.channels import check_channels
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.in_use import FileId
from pyqmigrate.io.job import Job, Progress
from pyqmigrate.io.memory import Memory, RamBlock, SnapshotMemory
from pyqmigrate.io.target import Descriptors, Target
from pyqmigrate.snapshot.base import Block, Snapshot, error_from_errno
from pyqmigrate.snapshot.detect import open_snapshot
from pyqmigrate.snapshot.load.memories import check_known, open_memory
from pyqmigrate.snapshot.load.staging import Place, StreamUnpacker
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.sequential import SequentialWriter
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport, Sparse, StreamWriter

__all__ = ["convert", "start_stream_conversion"]

_NO_FILE = FileId(0, 0)
_IMAGES = (Format.ELF, Format.LIME)


class ConvertOptions(TypedDict, total=False):
    """The options of :func:`convert`."""

    channels: int
    direct_io: DirectIO | str
    sparse: Sparse | str
    memories: Mapping[str, Memory] | None
    placements: Sequence[GivenPlacement] | None
    max_ram_below_4g: int | None
    byte_order: Literal["little", "big"] | None
    like: str | os.PathLike[str] | None
    image_format: str | None
    description: bytes | None
    progress: Callable[[Progress], object] | None


@overload
def convert(
    source: Snapshot | Target,
    target: Target,
    *,
    to: Literal[
        Format.MAPPED_RAM, Format.SEQUENTIAL, Format.LIBVIRT, "mapped-ram", "stream", "libvirt"
    ],
    **options: Unpack[ConvertOptions],
) -> SaveReport: ...


@overload
def convert(
    source: Snapshot | Target,
    target: Target,
    *,
    to: Literal[Format.RAW, "raw"],
    **options: Unpack[ConvertOptions],
) -> RawReport: ...


@overload
def convert(
    source: Snapshot | Target,
    target: Target,
    *,
    to: Literal[Format.ELF, Format.LIME, "elf", "lime"],
    **options: Unpack[ConvertOptions],
) -> ImageReport: ...


@overload
def convert(
    source: Snapshot | Target,
    target: Target,
    *,
    to: Format | str,
    **options: Unpack[ConvertOptions],
) -> SaveReport | RawReport | ImageReport: ...


def convert(
    source: Snapshot | Target,
    target: Target,
    *,
    to: Format | str,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    sparse: Sparse | str = Sparse.AUTO,
    memories: Mapping[str, Memory] | None = None,
    placements: Sequence[GivenPlacement] | None = None,
    max_ram_below_4g: int | None = None,
    byte_order: Literal["little", "big"] | None = None,
    like: str | os.PathLike[str] | None = None,
    image_format: str | None = None,
    description: bytes | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> SaveReport | RawReport | ImageReport:
    """Write the snapshot in another form, and wait until that is durable.

    source: an open snapshot, which stays open, or a target as for ``open_snapshot``; for a
        mapped-ram file and for raw files also the path of a pipe with a sequential stream.
    target: as for a save; for raw files a directory; for an image of libvirt's a path. A sequential
        stream can also go to Descriptors of a pipe or socket. It must not be the source, under any
        name.
    memories: the content of blocks that the snapshot lists but does not contain
        (``x-ignore-shared``). A sequential stream leaves out blocks that are not given. Only for the
        stream forms, including an image of libvirt's.
    placements, max_ram_below_4g: for an ELF core or a LiME file, as in
        :func:`~pyqmigrate.export.elf.write_elf`.
    byte_order: the guest's, for an ELF core: as in :func:`~pyqmigrate.export.elf.write_elf`.
    like, image_format: for an image of libvirt's, as in
        :func:`~pyqmigrate.export.libvirt.image_header`.
    description: JSON text that describes the device sections, instead of the snapshot's own
        (:func:`pyqmigrate.vm.twin.twin.describe_snapshot`). Raw files have none.
    channels, direct_io, sparse, progress: as in :func:`pyqmigrate.api.save`; a sequential stream is
        written by one channel through the page cache.

    Returns a SaveReport for the stream forms and an image of libvirt's, a RawReport for raw files,
    an ImageReport for an ELF core and a LiME file. Raises SnapshotError for a source that is damaged
    or whose end is missing, NotSupported if its content cannot be converted, BlockMismatch and
    UsageError for bad arguments, TargetError, Cancelled. The target is unchanged then, unless it is
    written in place.
    """
    form = parse_enum(Format, to, "to")
    if form is Format.INCREMENT:
        raise UsageError("no snapshot is converted to an increment: a save writes them")
    check_channels(channels)
    parse_enum(DirectIO, direct_io, "direct_io")
    parse_enum(Sparse, sparse, "sparse")
    check_callback("progress", progress)
    if memories is not None:
        check_mapping("memories", memories)
    check_placements(placements)
    if byte_order not in (None, "little", "big"):
        raise UsageError(f"byte_order must be 'little' or 'big', not {byte_order!r}")
    check("like", like, str, os.PathLike, type(None))
    check("image_format", image_format, str, type(None))
    check("max_ram_below_4g", max_ram_below_4g, int, type(None))
    if max_ram_below_4g is not None and not 0 < max_ram_below_4g <= 1 << 32:
        raise UsageError(f"max_ram_below_4g must be 1 byte to 4 GiB, not {max_ram_below_4g}")
    check("description", description, bytes, type(None))
    if memories and form not in (Format.MAPPED_RAM, Format.SEQUENTIAL, Format.LIBVIRT):
        raise UsageError("memories are for a mapped-ram file and a sequential stream")
    if (placements or max_ram_below_4g is not None) and form not in _IMAGES:
        raise UsageError("placements and max_ram_below_4g are for an ELF core and a LiME file")
    if byte_order and form is not Format.ELF:
        raise UsageError("a byte order is for an ELF core")
    if (like, image_format) != (None, None) and form is not Format.LIBVIRT:
        raise UsageError("like and image_format are for an image of libvirt's")
    with contextlib.ExitStack() as stack:
        opened: Snapshot
        if isinstance(source, Snapshot):
            opened = source
        else:
            once = form in (Format.MAPPED_RAM, Format.RAW, Format.LIBVIRT)
            opened = open_snapshot(source, allow_pipe=once)
            stack.callback(opened.close)
        opened.refuse_as_target(target)
        prefix = b""
        if form is Format.LIBVIRT:
            if like is None:
                raise UsageError("an image of libvirt's needs like, an image of the same domain")
            header = image_header(opened, like, image_format)
            form, prefix = Format.MAPPED_RAM if header.sparse else Format.SEQUENTIAL, header.data
        one_pass = form in (Format.MAPPED_RAM, Format.RAW)  # of a sequential stream
        if not one_pass:
            opened.prepare_random_reads(progress)
        elif opened.makes_index:
            opened.read_through(progress)
        if form is Format.RAW:
            if isinstance(target, Descriptors):
                raise UsageError("raw files go to a directory, not to descriptors")
            return unpack(opened, target, channels=channels, direct_io=direct_io, progress=progress)
        if form is Format.ELF:
            return write_elf(
                opened,
                target,
                placements=placements,
                channels=channels,
                direct_io=direct_io,
                sparse=sparse,
                byte_order=byte_order,
                description=description,
                progress=progress,
                max_ram_below_4g=max_ram_below_4g,
            )
        if form is Format.LIME:
            return write_lime(
                opened,
                target,
                placements=placements,
                channels=channels,
                direct_io=direct_io,
                sparse=sparse,
                description=description,
                progress=progress,
                max_ram_below_4g=max_ram_below_4g,
            )
        return start_stream_conversion(
            opened,
            target,
            to=form,
            channels=channels,
            direct_io=direct_io,
            sparse=sparse,
            memories=memories,
            prefix=prefix,
            description=description,
        ).wait(progress)


def check_placements(placements: object) -> None:
    """Raise UsageError unless they are results of parse_placement, or None."""
    if placements is None:
        return
    if not isinstance(placements, Sequence) or isinstance(placements, str | bytes):
        raise UsageError(f"placements must be a list, not {placements!r}")
    for placement in placements:
        check("a placement", placement, GivenPlacement)


def start_stream_conversion(
    source: Snapshot,
    target: Target,
    *,
    to: Format,
    channels: int = 2,
    direct_io: DirectIO | str = DirectIO.AUTO,
    sparse: Sparse | str = Sparse.AUTO,
    memories: Mapping[str, Memory] | None = None,
    prefix: bytes = b"",
    description: bytes | None = None,
) -> Job[SaveReport]:
    """Start to write a mapped-ram file or a sequential stream; return at once.

    Arguments and errors are those of :func:`convert`; ``prefix`` is what the file has before its
    stream. Keep ``source`` open until the job has ended.
    """
    source.refuse_as_target(target)
    if source.one_pass and to is Format.MAPPED_RAM:
        return _start_one_pass(
            source,
            target,
            parse_enum(DirectIO, direct_io, "direct_io"),
            parse_enum(Sparse, sparse, "sparse"),
            check_channels(channels),
            memories or {},
            prefix,
            description,
        )
    carried = carried_of(source.source, source.stream, description)
    blocks, left_out = _blocks(source, memories or {})
    writer: StreamWriter
    stream = source.stream
    options = SaveOptions(
        channels=check_channels(channels),
        machine=stream.machine,
        target_page_bits=stream.target_page_bits,
        uuid=stream.uuid,
        left_out=left_out or None,
        before=carried.before,
        prefix=prefix,
    )
    if to is Format.SEQUENTIAL:
        writer = SequentialWriter(target, blocks, options)
    else:
        options = replace(
            options,
            direct_io=parse_enum(DirectIO, direct_io, "direct_io"),
            sparse=parse_enum(Sparse, sparse, "sparse"),
        )
        writer = Writer(target, blocks, options)
    try:
        return Job(writer.channels, writer.total, lambda: _write(writer, source, carried, to))
    except BaseException:
        writer.close()
        raise


def _start_one_pass(
    source: Snapshot,
    target: Target,
    direct_io: DirectIO,
    sparse: Sparse,
    channels: int,
    memories: Mapping[str, Memory],
    prefix: bytes,
    description: bytes | None,
) -> Job[SaveReport]:
    """Start to write a mapped-ram file in one pass over a sequential stream."""
    _check_memories(source, memories)
    configuration = source.stream_file.configuration
    writer = Writer(
        target,
        [
            RamBlock(
                name,
                memories[name] if name in memories else _nothing(block, source.identity),
                block.page_size,
                block.address or 0,
            )
            for name, block in source.blocks.items()
        ],
        SaveOptions(
            direct_io=direct_io,
            sparse=sparse,
            channels=channels,
            machine=source.machine,
            target_page_bits=configuration.target_page_bits,
            uuid=configuration.uuid,
            before=sections_before(source.source, source.head),
            prefix=prefix,
        ),
    )
    try:
        unpacker = source.unpacker(writer.channels, writer.policy, writer.target.name)
        return Job(
            unpacker.reading,
            writer.total,
            lambda: _place(writer, unpacker, source, memories, description),
        )
    except BaseException:
        writer.close()
        raise


def _place(
    writer: Writer,
    unpacker: StreamUnpacker,
    source: Snapshot,
    memories: Mapping[str, Memory],
    description: bytes | None,
) -> SaveReport:
    with contextlib.closing(writer), writer.target.opened_for_reading() as fd:
        writer.begin()
        if memories:
            writer.write_pages()
        stream = unpacker.run(
            {
                layout.name: Place(fd, writer.target.direct, layout.pages_offset, bitmap)
                for layout, bitmap in zip(writer.head.blocks, writer.bitmaps, strict=True)
                if layout.name not in memories
            }
        )
        for name in source.blocks:
            if stream.ignore_shared and name not in memories and name not in unpacker.mentioned:
                raise _left_out(name)
        data = sum(bitmap.count() for bitmap in writer.bitmaps)
        carried = carried_of(source.source, stream, description)
        report = writer.finish_with(carried.tail(source.source, Format.MAPPED_RAM, writer.settings))
        pages = sum(bitmap.npages for bitmap in writer.bitmaps)
        return replace(report, data_pages=data, zero_pages=pages - data)


def _left_out(name: str) -> NotSupported:
    return NotSupported(
        f"the content of block {name!r} is not in this stream, which only its end shows: give its"
        " memory"
    )


def _write(writer: StreamWriter, source: Snapshot, carried: Carried, to: Format) -> SaveReport:
    with contextlib.closing(writer):
        writer.begin()
        try:
            writer.write_pages()
        except GuestMemoryError as error:
            # The "memory" here is the source.
            raise error_from_errno(
                error.errno or errno.EIO, source.source, error.block or ""
            ) from error
        return writer.finish_with(carried.tail(source.source, to, writer.settings))


def _blocks(source: Snapshot, memories: Mapping[str, Memory]) -> tuple[list[RamBlock], list[str]]:
    """Return the blocks with their memories, and the names of those without memory."""
    _check_memories(source, memories)
    blocks, left_out = [], []
    for name, block in source.blocks.items():
        memory = memories.get(name)
        if memory is None and block.external:
            left_out.append(name)
            memory = _nothing(block)
        elif memory is None:
            memory = block.memory()
        blocks.append(RamBlock(name, memory, block.page_size, block.address or 0))
    if not blocks:
        raise NotSupported("the snapshot has no RAM blocks")
    return blocks, left_out


def _check_memories(source: Snapshot, memories: Mapping[str, Memory]) -> None:
    check_known(memories, source.blocks)
    for name, memory in memories.items():
        open_memory(name, memory, source.blocks[name].length, writable=False).close()


def _nothing(block: Block, identity: FileId = _NO_FILE) -> SnapshotMemory:
    """Return memory that is listed and never read; ``identity`` is that of the file."""
    empty = BlockIndex(block.num_pages, block.page_size)
    return SnapshotMemory(block.length, 0, identity, MemorySource.sequential(empty, -1))
