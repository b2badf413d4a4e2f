"""The sequential stream, one pass out and one pass in: what QEMU writes and reads with ``file:`` and
without mapped-ram.

    with_memory = RamBlock("pc.ram", memory)
    start_sequential_save("/snap/guest.sequential", [with_memory], machine="pc-q35-10.0").wait()
    source = InputFile("/snap/guest.sequential")
    report = start_sequential_load(source, {"pc.ram": buffer}).wait()

Pages stand one after another in the order in which they were saved; a page that changes during a
save is there again. So there is one channel, direct I/O has no use, and a reader has to read
everything.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyqmigrate.core import Block, Channel, Fault, Transfer, error_from_fault, file_error_from_fault
from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import (
    BlockMismatch,
    Cancelled,
    NotSupported,
    PyqmigrateError,
    SnapshotError,
    SnapshotTruncated,
)
from pyqmigrate.format.device.sections import DeviceSection
from pyqmigrate.format.stream.sequential import (
    RAM_EOS,
    ListedBlock,
    SequentialStream,
    SequentialWalk,
    encode_end,
    encode_head,
    encode_part_header,
    settings_of,
)
from pyqmigrate.format.stream.wire import MAGIC, SectionKind
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, split_ranges
from pyqmigrate.io.forward_output import ForwardOutput, goes_forward
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, OpenMemory, RamBlock
from pyqmigrate.io.pipe import ForwardInput
from pyqmigrate.io.records import CHANGES_MAX, BlockName, Decoded, Decoder, Encoder, RecordFault
from pyqmigrate.io.target import DirectIO, InputFile, Target
from pyqmigrate.log import logger
from pyqmigrate.snapshot.load.mapped_ram import Clear, LoadReport
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport, Sparse, StreamWriter

__all__ = [
    "DEVICE_STATE_MAX",
    "PolledSource",
    "RecordDecoder",
    "SequentialLoadReport",
    "SequentialReader",
    "SequentialWriter",
    "read_body",
    "record_error",
    "start_sequential_load",
    "start_sequential_save",
]

DEVICE_STATE_MAX = 256 << 20  # bytes of device sections that a load hands back

_DEFAULTS = SaveOptions()
_BUFFERED = "a sequential stream goes through the page cache"


def start_sequential_save(
    target: Target,
    blocks: Sequence[RamBlock],
    *,
    machine: str = "",
    target_page_bits: int | None = None,
    reuse: bool = False,
    max_bandwidth: int = 0,
) -> Job[SaveReport]:
    """Begin to save guest memory as a sequential stream; returns at once.

    Arguments and errors as in :func:`pyqmigrate.api.start_save`. QEMU loads the file only on the
    machine of the name given: an empty one is accepted by any.
    """
    writer = SequentialWriter(
        target,
        blocks,
        SaveOptions(
            machine=machine,
            target_page_bits=target_page_bits,
            reuse=reuse,
            max_bandwidth=max_bandwidth,
        ),
    )
    try:
        return Job(writer.channels, writer.total, writer.run)
    except BaseException:
        writer.close()
        raise


class SequentialWriter(StreamWriter):
    """A sequential stream being written.

    Each pass is one PART section with a record for every page of the pass: a zero page, also one
    in a hole of a sparse memory, is a record of nine bytes. As in QEMU's own streams none is left
    out, for a page that is not mentioned keeps what the loading side has there, and that need not
    be zero: ROMs have content from the start. Holes are neither read nor made resident.

    Of the options, ``channels``, ``direct_io``, ``sparse`` and ``mark_zero`` have no effect.
    """

    sparse = Sparse.EXACT

    def __init__(
        self, target: Target, blocks: Sequence[RamBlock], options: SaveOptions = _DEFAULTS
    ) -> None:
        super().__init__(blocks, options, channels=1)
        with self._closed_on_error():
            self._head = encode_head(
                options.machine,
                self.specs,
                target_page_bits=options.target_page_bits,
                uuid=options.uuid,
                ignore_shared=options.left_out is not None,
                before=options.before,
            )
            self.settings = settings_of(
                options.machine,
                target_page_bits=options.target_page_bits,
                uuid=options.uuid,
                ignore_shared=options.left_out is not None,
            )
            self._names = [BlockName(spec.name) for spec in self.specs]
            self._open(target, DirectIO.OFF)
            self._encoder = Encoder(self.target.fd, self.target.offset, forward=self.target.forward)

    def _open(self, target: Target, direct_io: DirectIO) -> None:
        if goes_forward(target):
            self.target = ForwardOutput(target)
            self._cleanup.callback(self.target.abort)
        else:
            super()._open(target, direct_io)

    def _file_size(self) -> int:
        return self._encoder.position

    def begin(self) -> None:
        self._check_space()
        # A pipe takes nothing that comes later and belongs before.
        magic = MAGIC if self.target.forward else bytes(len(MAGIC))
        self._put(self._encoder, magic + self._head[len(MAGIC) :])

    def write_pages(self, selections: Sequence[Bitmap] | None = None) -> None:
        """As in the base; a pass that selects nothing writes nothing."""
        if selections is not None and not any(bitmap.count() for bitmap in selections):
            return
        self._pass(self.channels, self._encoder, selections)

    def clean(self) -> int:
        """Nothing is left of earlier passes that could be read; returns 0."""
        return 0

    def finish(
        self,
        sections: bytes = b"",
        description: bytes | None = None,
        *,
        switchover_start: bool = False,
    ) -> SaveReport:
        return self.finish_with(
            [
                encode_end(
                    settings=self.settings,
                    sections=sections,
                    description=description,
                    switchover_start=switchover_start,
                    page_size=self.specs[0].page_size,
                )
            ]
        )

    def finish_with(self, tail: Iterable[bytes]) -> SaveReport:
        for piece in tail:
            self._put(self._encoder, piece)
        self._check(self._encoder.flush(self.channels.core), self._encoder)
        if self.reuse:
            self.target.set_size(self._encoder.position)
        self._publish()
        return self._report()

    def _needed(self) -> int:
        records = sum(spec.length // spec.page_size for spec in self.specs) * _RECORD
        return sum(memory.extent_bytes for memory in self.memories) + records

    def _least(self) -> int:
        stored = (self.specs[n] for n in self.stored)
        return sum(spec.length // spec.page_size for spec in stored) * _RECORD

    def _count(self) -> int:
        """Bytes of all records of one pass."""
        counter = Encoder(-1, 0)
        self._pass(self.channels.sibling("pyqmigrate-count"), counter, None)
        return counter.position

    def _pass(
        self, channels: Channels, encoder: Encoder, selections: Sequence[Bitmap] | None
    ) -> None:
        transfers = [
            Transfer(
                channels.core,
                Block(spec.length, spec.page_size),
                memory=memory,
                selection=selections[n] if selections else None,
            )
            for n, (spec, memory) in enumerate(zip(self.specs, self.memories, strict=True))
        ]

        def move(channel: Channel, item: Range) -> int:
            transfer, name = transfers[item.block], self._names[item.block]
            return encoder.put_pages(transfer, channel, name, item.first, item.npages)

        self._put(encoder, encode_part_header())
        encoder.forget_block()
        channels.run(
            (
                item
                for n in self.stored
                for spec in [self.specs[n]]
                for item in split_ranges(n, spec.length // spec.page_size, spec.page_size)
            ),
            move,
            self.target.name,
            [spec.name for spec in self.specs],
        )
        self._put(encoder, RAM_EOS)

    def _put(self, encoder: Encoder, data: bytes) -> None:
        self._check(encoder.put(self.channels.core, data), encoder)

    def _check(self, rc: int, encoder: Encoder) -> None:
        if rc:
            raise file_error_from_fault(
                rc, encoder.fault, "cannot write the stream", self.target.name
            )

    def _direct_io_reason(self) -> str:
        return _BUFFERED


_RECORD = 8 + 1  # bytes of a record beside its page: the word, and a zero page's filling


@dataclass(frozen=True)
class SequentialLoadReport(LoadReport):
    """What a load of a sequential stream did, and what else the stream had.

    ``data_pages`` and ``zero_pages`` count records: a page that was saved again is counted again.
    Pages that no record mentions are zero pages where they were cleared. ``devices`` are the
    device sections in the order of the stream, as far as it could be walked
    (``stream.opaque_tail``). ``skipped`` names the blocks that were not loaded: those that the
    caller left out, and those of an ``x-ignore-shared`` stream without a record.
    """

    stream: SequentialStream
    devices: tuple[DeviceSection, ...]
    skipped: tuple[str, ...]


def start_sequential_load(
    source: InputFile,
    memories: Mapping[str, Memory],
    *,
    skip_unknown_blocks: bool = False,
    clear: Clear | str = Clear.ZERO,
    page_size: int | None = None,
    max_bandwidth: int = 0,
) -> Job[SequentialLoadReport]:
    """Begin to load a sequential stream into the memories of its blocks; returns at once.

    source: borrowed; keep it open until the job has ended.
    memories: a writable buffer or FileMemory for each block, of just its length.
    skip_unknown_blocks: whether blocks without a memory are read over.
    clear: whether pages that no record mentions are made zero, or left as they are. A change to a
        page (XBZRLE) applies to zeros, or to what the memory holds, likewise.
    page_size: bytes; needed where neither configuration nor description tells and it is not 4096.
    max_bandwidth: bytes a second; 0 is no limit.

    Reads the head before it returns. Raises SnapshotError for a damaged file, NotSupported for one
    of another kind, BlockMismatch for memories that do not fit, UsageError, TargetError; the
    job's result raises these too, GuestMemoryError, Cancelled. What was loaded before a failure
    stays in the memories.
    """
    reader = SequentialReader(
        source,
        memories,
        skip_unknown_blocks=skip_unknown_blocks,
        clear=parse_enum(Clear, clear, "clear"),
        page_size=page_size,
        max_bandwidth=max_bandwidth,
    )
    try:
        return Job(reader.channels, reader.total, reader.run)
    except BaseException:
        reader.close()
        raise


class PolledSource:
    """The stream's framing, for a new pass; reading it ends when the job is cancelled.

    ``run_out`` is for the walk over a source that passes by; None for another one.
    """

    def __init__(self, source: InputFile, channels: Channels) -> None:
        self._source = source
        self._channels = channels
        self.run_out: Callable[[], int] | None = None
        source.rewind()
        if isinstance(source, ForwardInput):
            source.stop = lambda: channels.cancelled
            self.run_out = source.run_out

    @property
    def size(self) -> int:
        return self._source.size

    def read_at(self, offset: int, length: int) -> bytes:
        if self._channels.cancelled:
            raise Cancelled("cancelled")
        return self._source.read_at(offset, length)


class RecordDecoder(Decoder):
    """A decoder of the records of these blocks, from a stream's file."""

    def __init__(self, blocks: Sequence[ListedBlock], page_size: int) -> None:
        super().__init__([(block.name, block.length) for block in blocks], page_size)
        self.blocks = blocks

    def read(self, source: InputFile, channels: Channels, offset: int) -> int:
        """Take in the body of records at ``offset``; returns where it ends.

        Raises SnapshotError, NotSupported, TargetError, Cancelled.
        """
        self.position = offset
        rc = read_body(channels, self, source)
        if rc < 0:
            raise self.failure(rc, source)
        return self.position

    def failure(self, rc: int, source: InputFile) -> PyqmigrateError:
        """The exception for a negative return that has to do with the stream's file."""
        if rc == -errno.EBADMSG:
            return record_error(self)
        if rc == -errno.ENODATA:
            return SnapshotTruncated(
                "the file ends within RAM's pages: it was cut short, or the save did not finish",
                offset=self.position,
            )
        return file_error_from_fault(rc, self.fault, "cannot read the stream", source.name)


def read_body(channels: Channels, decoder: Decoder, source: InputFile) -> int:
    """Decode from the decoder's position to the end of the section; returns what
    :meth:`~pyqmigrate.io.records.Decoder.decode_file` does, for any source."""
    if not isinstance(source, ForwardInput):
        return decoder.decode_file(channels.core, source.fd, source.size)
    while True:
        start = decoder.position
        data = source.here(start)
        if not data:
            decoder.fault.clear()
            return -errno.ENODATA
        rc = decoder.decode(channels.core, data)
        channels.core.count_io(decoder.position - start)
        if rc == Decoded.END:
            source.leave(decoder.position)
        if rc:
            return rc


class SequentialReader:
    """A sequential stream being read: its head is parsed on construction, ``run`` does the rest.

    ``configuration``, ``blocks``, ``page_size`` and ``total`` (bytes of guest memory to load) hold
    from the start.
    """

    def __init__(
        self,
        source: InputFile,
        memories: Mapping[str, Memory],
        *,
        skip_unknown_blocks: bool = False,
        clear: Clear = Clear.ZERO,
        page_size: int | None = None,
        max_bandwidth: int = 0,
    ) -> None:
        self.started = time.monotonic()
        self.source = source
        self.clear = clear
        self.channels = Channels(1, "pyqmigrate-load")
        self.channels.set_rate(max_bandwidth)
        polled = PolledSource(source, self.channels)
        self._walk = SequentialWalk(
            polled, source.offset, self._read_records, page_size=page_size, run_out=polled.run_out
        )
        self._walk.read_head()
        self.configuration = self._walk.configuration
        self.blocks = self._walk.blocks
        self.page_size = self._walk.page_size
        _match(self.blocks, memories, skip_unknown_blocks)
        with contextlib.ExitStack() as stack:
            self._loads: list[tuple[ListedBlock, OpenMemory, Bitmap]] = []
            for block in self.blocks:
                if block.name in memories:
                    memory = self._attach(block, memories[block.name])
                    stack.callback(memory.close)
                    bitmap = Bitmap(block.length // self.page_size)
                    stack.callback(bitmap.close)
                    self._loads.append((block, memory, bitmap))
            self._records = self._new_records()
            self._cleanup = stack.pop_all()

    @property
    def total(self) -> int:
        """Bytes of guest memory that will be loaded."""
        return sum(block.length for block, _, _ in self._loads)

    def close(self) -> None:
        """May be repeated."""
        self._cleanup.close()

    def run(self) -> SequentialLoadReport:
        """Read on to the end of the stream, and close."""
        with self._cleanup:
            stream = self._walk.stream()
            return self._report(stream, self._clear_rest(stream), self._read_devices(stream))

    def _attach(self, block: ListedBlock, memory: Memory) -> OpenMemory:
        attached = OpenMemory(block.name, memory, writable=True)
        try:
            attached.refuse_as_source(self.source.file_fd)
            if attached.length != block.length:
                raise BlockMismatch(
                    f"memory of block {block.name!r} has {attached.length} bytes, "
                    f"the snapshot {block.length}"
                )
        except BaseException:
            attached.close()
            raise
        return attached

    def _new_records(self) -> RecordDecoder:
        loads = {block.name: (memory, bitmap) for block, memory, bitmap in self._loads}
        records = RecordDecoder(self.blocks, self.page_size)
        for number, block in enumerate(self.blocks):
            if block.name in loads:
                records.write_to_memory(number, *loads[block.name])
        records.start(fresh=self.clear is Clear.ZERO)
        return records

    def _read_records(self, offset: int) -> int:
        records, fault = self._records, self._records.fault
        records.position = offset
        rc = read_body(self.channels, records, self.source)
        if rc < 0 and fault.in_memory and rc != -errno.EBADMSG:
            raise error_from_fault(rc, fault, self.source.name, self.blocks[fault.block].name)
        if rc < 0:
            raise records.failure(rc, self.source)
        return records.position

    def _clear_rest(self, stream: SequentialStream) -> set[str]:
        """Zero what no record mentioned; returns the blocks whose content is elsewhere."""
        elsewhere = set()
        for block, memory, bitmap in self._loads:
            if stream.ignore_shared and bitmap.last() < 0:
                elsewhere.add(block.name)
            elif self.clear is Clear.ZERO:
                transfer = Transfer(
                    self.channels.core,
                    Block(block.length, self.page_size),
                    memory=memory,
                    data=bitmap,
                )
                fault = Fault()
                rc = transfer.zero_clear(fault)
                if rc:
                    raise error_from_fault(rc, fault, self.source.name, block.name)
        return elsewhere

    def _read_devices(self, stream: SequentialStream) -> tuple[DeviceSection, ...]:
        full = [s for s in stream.sections if s.kind is SectionKind.FULL]
        total = sum(section.body_length for section in full)
        if total > DEVICE_STATE_MAX:
            raise NotSupported(
                f"device state of {total >> 20} MiB; at most {DEVICE_STATE_MAX >> 20} are read"
            )
        return tuple(
            DeviceSection(
                s.name,
                self.source.read_at(s.body_offset, s.body_length),
                s.instance_id,
                s.version_id,
            )
            for s in full
        )

    def _report(
        self, stream: SequentialStream, elsewhere: set[str], devices: tuple[DeviceSection, ...]
    ) -> SequentialLoadReport:
        totals = self.channels.totals()
        loaded = {block.name for block, _, _ in self._loads} - elsewhere
        report = SequentialLoadReport(
            data_pages=totals.data_pages,
            zero_pages=totals.zero_pages,
            bytes_read=totals.bytes_moved,
            seconds=time.monotonic() - self.started,
            direct_io=False,
            direct_io_reason=_BUFFERED,
            channels=self.channels.count,
            unaligned_blocks=(),
            stream=stream,
            devices=devices,
            skipped=tuple(block.name for block in self.blocks if block.name not in loaded),
        )
        logger.info(
            "loaded %s: %d data pages, %d zero pages, %d bytes read",
            self.source.name,
            report.data_pages,
            report.zero_pages,
            report.bytes_read,
        )
        return report


def record_error(decoder: RecordDecoder) -> PyqmigrateError:
    """What is wrong with the record at which ``decoder`` stopped."""
    error = decoder.error()
    unable = {
        RecordFault.COMPRESSED: "a compressed page, as QEMU wrote until 9.0",
        RecordFault.MULTIFD: "a multifd stream without mapped-ram: its pages went over other "
        "channels",
        RecordFault.CHANGES: f"more than {CHANGES_MAX} changes to one page: too many for an index",
    }
    if error.fault in unable:
        return NotSupported(f"{unable[error.fault]} (file offset {error.position:#x})")
    block = None if error.block is None else decoder.blocks[error.block].name
    if error.fault is RecordFault.UNKNOWN:
        block = error.name.decode("utf-8", "surrogateescape")
    message, field = {
        RecordFault.FLAGS: (f"no page record has the word {error.word:#x}", "flags"),
        RecordFault.NO_BLOCK: ("a page record continues no block", "name"),
        RecordFault.UNKNOWN: ("a page record of a block that is not listed", "name"),
        RecordFault.OUTSIDE: (
            f"page at {error.word & -decoder.page_size:#x}, outside of its block",
            "offset",
        ),
        RecordFault.DELTA: ("the change to a page does not fit it", "xbzrle"),
        RecordFault.SCATTERED: ("few pages at far places: no guest is like that", "offset"),
    }[error.fault]
    return SnapshotError(message, offset=error.position, block=block, field=field)


def _match(
    blocks: Sequence[ListedBlock], memories: Mapping[str, Memory], skip_unknown: bool
) -> None:
    names = [block.name for block in blocks]
    missing = [name for name in names if name not in memories]
    unknown = [name for name in memories if name not in names]
    if missing and not skip_unknown:
        raise BlockMismatch(
            f"no memory is given for block {missing[0]!r}; the snapshot has {names}"
        )
    if unknown:
        raise BlockMismatch(f"the snapshot has no block {unknown[0]!r}; it has {names}")
