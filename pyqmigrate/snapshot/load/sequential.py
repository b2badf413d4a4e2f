"""Write and read a sequential stream, as QEMU does with ``file:`` and without mapped-ram.

    with_memory = RamBlock("pc.ram", memory)
    start_sequential_save("/snap/guest.sequential", [with_memory], machine="pc-q35-10.0").wait()
    stream_file = StreamFile.open("/snap/guest.sequential")
    report = start_sequential_load(stream_file, {"pc.ram": buffer}).wait()

Pages are stored in the order in which they were saved; a page that changes during a save is stored
again. So there is one channel, direct I/O has no use, and a reader has to read everything.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyqmigrate.core import Block, Channel, Fault, Transfer, error_from_fault, file_error_from_fault
from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import (
    Cancelled,
    NotSupported,
    PyqmigrateError,
    SnapshotError,
    SnapshotTruncated,
)
from pyqmigrate.format.device.sections import DeviceSection
from pyqmigrate.format.stream.sequential import (
    ListedBlock,
    SequentialStream,
    SequentialStreamReader,
    encode_head,
    settings_of,
)
from pyqmigrate.format.stream.wire import MAGIC, SectionKind
from pyqmigrate.format.stream.writer import RAM_EOS, encode_end, encode_part_header
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, split_ranges
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.forward_output import ForwardOutput, goes_forward
from pyqmigrate.io.input import Source
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, OpenMemory, RamBlock
from pyqmigrate.io.records import CHANGES_MAX, BlockName, Decoded, Decoder, Encoder, RecordFault
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Target
from pyqmigrate.log import logger
from pyqmigrate.snapshot.load.mapped_ram import Clear, LoadReport
from pyqmigrate.snapshot.load.memories import match_memories, open_memory
from pyqmigrate.snapshot.save.writer import SaveOptions, SaveReport, Sparse, StreamWriter

__all__ = [
    "LOADED_STATE_MAX",
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

LOADED_STATE_MAX = 256 << 20  # bytes of device sections that a load hands back

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
    """Start to save guest memory as a sequential stream; return at once.

    Arguments and errors are those of :func:`pyqmigrate.api.start_save`. QEMU loads the file only on
    the machine that it names: every machine accepts an empty name.
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
    in a hole of a sparse memory, is a record of nine bytes. As in QEMU's own streams no page is
    left out: a page that no record mentions keeps its content on the loading side, which need not
    be zero, since ROMs have content from the start. Holes are neither read nor made resident.

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
        # A pipe cannot take the magic later.
        magic = MAGIC if self.target.forward else bytes(len(MAGIC))
        self._put(self._encoder, magic + self._head[len(MAGIC) :])

    def write_pages(self, selections: Sequence[Bitmap] | None = None) -> None:
        """Write a pass as the base does; a pass that selects nothing writes nothing."""
        if selections is not None and not any(bitmap.count() for bitmap in selections):
            return
        self._pass(self.channels, self._encoder, selections)

    def clean(self) -> int:
        """Return 0: no reader sees the pages of earlier passes."""
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
        """Return the bytes of all records of one pass."""
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
    stream_file: StreamFile,
    memories: Mapping[str, Memory],
    *,
    skip_unknown_blocks: bool = False,
    clear: Clear | str = Clear.ZERO,
    page_size: int | None = None,
    max_bandwidth: int = 0,
) -> Job[SequentialLoadReport]:
    """Start to load a sequential stream into the memories of its blocks; return at once.

    stream_file: borrowed; keep it open until the job has ended.
    memories: a writable buffer or FileMemory for each block, of exactly its length.
    skip_unknown_blocks: whether blocks without a memory are skipped.
    clear: whether pages that no record mentions are made zero, or left as they are. A change to a
        page (XBZRLE) applies to zeros, or to what the memory holds, likewise.
    page_size: bytes; needed if neither configuration nor description states it and it is not 4096.
    max_bandwidth: bytes a second; 0 is no limit.

    The head is read before this returns. Raises SnapshotError for a damaged file, NotSupported for
    a file of another kind, BlockMismatch for memories that do not match, UsageError, TargetError;
    the job's result raises these too, GuestMemoryError, Cancelled. Pages that were loaded before a
    failure stay in the memories.
    """
    reader = SequentialReader(
        stream_file,
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
    """The framing of a stream, for a new pass; reading it ends when the job is cancelled."""

    def __init__(self, source: Source, channels: Channels) -> None:
        self._source = source
        self._channels = channels
        self.run_out = source.run_out
        source.rewind()
        source.poll_with(lambda: channels.cancelled)

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

    def read(self, source: Source, channels: Channels, offset: int) -> int:
        """Read the body of records at ``offset``; return where it ends.

        Raises SnapshotError, NotSupported, TargetError, Cancelled.
        """
        self.position = offset
        rc = read_body(channels, self, source)
        if rc < 0:
            raise self.error_from_decoder(rc, source)
        return self.position

    def error_from_decoder(self, rc: int, source: Source) -> PyqmigrateError:
        """Return the exception for a negative return that concerns the stream's file."""
        if rc == -errno.EBADMSG:
            return record_error(self)
        if rc == -errno.ENODATA:
            return SnapshotTruncated(
                "the file ends within RAM's pages: it was cut short, or the save did not finish",
                offset=self.position,
            )
        return file_error_from_fault(rc, self.fault, "cannot read the stream", source.name)


def read_body(channels: Channels, decoder: Decoder, source: Source) -> int:
    """Decode from the decoder's position to the end of the section, from any source; return what
    :meth:`~pyqmigrate.io.records.Decoder.decode_file` does."""
    if not source.forward:
        return decoder.decode_file(channels.core, source.fd, source.size)
    while True:
        start = decoder.position
        data = source.read_once(start)
        if not data:
            decoder.fault.clear()
            return -errno.ENODATA
        rc = decoder.decode(channels.core, data)
        channels.core.count_io(decoder.position - start)
        if rc == Decoded.END:
            source.keep_from(decoder.position)
        if rc:
            return rc


class SequentialReader:
    """A sequential stream being read. Construction parses its head, :meth:`run` does the rest.

    ``configuration``, ``blocks``, ``page_size`` and ``total`` (bytes of guest memory to load) are
    known from the start.
    """

    def __init__(
        self,
        stream_file: StreamFile,
        memories: Mapping[str, Memory],
        *,
        skip_unknown_blocks: bool = False,
        clear: Clear = Clear.ZERO,
        page_size: int | None = None,
        max_bandwidth: int = 0,
    ) -> None:
        self.started = time.monotonic()
        self.source = source = stream_file.source
        self.clear = clear
        self.channels = Channels(1, "pyqmigrate-load")
        self.channels.set_rate(max_bandwidth)
        polled = PolledSource(source, self.channels)
        self._walk = SequentialStreamReader(
            polled,
            stream_file.offset,
            self._read_records,
            page_size=page_size,
            run_out=polled.run_out,
        )
        self._walk.read_head(stream_file.start)
        self.configuration = self._walk.configuration
        self.blocks = self._walk.blocks
        self.page_size = self._walk.page_size
        match_memories(
            [block.name for block in self.blocks], memories, skip_missing=skip_unknown_blocks
        )
        with contextlib.ExitStack() as stack:
            self._loads: list[tuple[ListedBlock, OpenMemory, Bitmap]] = []
            for block in self.blocks:
                if block.name in memories:
                    memory = open_memory(
                        block.name,
                        memories[block.name],
                        block.length,
                        writable=True,
                        source_fd=source.file_fd,
                    )
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
        """Close it. Idempotent."""
        self._cleanup.close()

    def run(self) -> SequentialLoadReport:
        """Read to the end of the stream, and close."""
        with self._cleanup:
            stream = self._walk.stream()
            return self._report(stream, self._clear_rest(stream), self._read_devices(stream))

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
            raise records.error_from_decoder(rc, self.source)
        return records.position

    def _clear_rest(self, stream: SequentialStream) -> set[str]:
        """Zero the pages that no record mentioned; return the blocks stored in other files."""
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
        if total > LOADED_STATE_MAX:
            raise NotSupported(
                f"device state of {total >> 20} MiB; at most {LOADED_STATE_MAX >> 20} are read"
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
    """Return the exception for the record at which ``decoder`` stopped."""
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
        RecordFault.FLAGS: (f"invalid flags {error.word:#x} in a page record", "flags"),
        RecordFault.NO_BLOCK: ("page record has CONTINUE but no block came before it", "name"),
        RecordFault.UNKNOWN: ("a page record for a block that is not listed", "name"),
        RecordFault.OUTSIDE: (
            f"page at {error.word & -decoder.page_size:#x}, outside of its block",
            "offset",
        ),
        RecordFault.DELTA: ("the change to a page does not fit it", "xbzrle"),
        RecordFault.SCATTERED: ("pages too sparse for a real guest", "offset"),
    }[error.fault]
    return SnapshotError(message, offset=error.position, block=block, field=field)
