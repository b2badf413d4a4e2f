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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyqmigrate import _core
from pyqmigrate.enums import parse_enum
from pyqmigrate.errors import (
    Cancelled,
    NoSpace,
    NotSupported,
    PyqmigrateError,
    SnapshotError,
    SnapshotTruncated,
    TargetError,
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
from pyqmigrate.io.channels import Channels, Job, Range, failure, split_ranges
from pyqmigrate.io.direct_io import DirectIO
from pyqmigrate.io.forward_output import ForwardOutput, goes_forward
from pyqmigrate.io.input import Source
from pyqmigrate.io.memory import Memory, OpenMemory, RamBlock
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Target
from pyqmigrate.log import logger
from pyqmigrate.snapshot.load.mapped_ram import Clear, LoadReport
from pyqmigrate.snapshot.load.memories import match_memories, open_memory
from pyqmigrate.snapshot.save.writer import SaveReport, Sparse, StreamWriter

__all__ = [
    "LOADED_STATE_MAX",
    "PolledSource",
    "RecordDecoder",
    "SequentialLoadReport",
    "SequentialReader",
    "SequentialWriter",
    "core_name",
    "read_body",
    "record_error",
    "stream_error",
    "start_sequential_load",
    "start_sequential_save",
]

LOADED_STATE_MAX = 256 << 20  # bytes of device sections that a load hands back

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
        machine=machine,
        target_page_bits=target_page_bits,
        reuse=reuse,
        max_bandwidth=max_bandwidth,
    )
    try:
        return Job(writer.channels, writer.total, writer.run)
    except BaseException:
        writer.close()
        raise


def core_name(name: str) -> tuple[Any, Any]:
    """Return a block's name as the core's ``struct qm_name *``, and the bytes to keep alive."""
    data = name.encode("utf-8", "surrogateescape")
    text = _core.ffi.new("unsigned char[]", data)
    core = _core.ffi.new("struct qm_name *")
    core.bytes, core.len = text, len(data)
    return core, text


class SequentialWriter(StreamWriter):
    """A sequential stream being written.

    Each pass is one PART section with a record for every page of the pass: a zero page, also one
    in a hole of a sparse memory, is a record of nine bytes. As in QEMU's own streams no page is
    left out: a page that no record mentions keeps its content on the loading side, which need not
    be zero, since ROMs have content from the start. Holes are neither read nor made resident.

    ``before`` are encoded elements that precede RAM's.
    """

    sparse = Sparse.EXACT

    def __init__(
        self,
        target: Target,
        blocks: Sequence[RamBlock],
        *,
        machine: str = "",
        target_page_bits: int | None = None,
        uuid: bytes | None = None,
        left_out: Collection[str] | None = None,
        before: bytes = b"",
        reuse: bool = False,
        max_bandwidth: int = 0,
        prefix: bytes = b"",
    ) -> None:
        super().__init__(
            blocks,
            channels=1,
            reuse=reuse,
            max_bandwidth=max_bandwidth,
            prefix=prefix,
            left_out=left_out,
        )
        with self._closed_on_error():
            self._head = encode_head(
                machine,
                self.specs,
                target_page_bits=target_page_bits,
                uuid=uuid,
                ignore_shared=left_out is not None,
                before=before,
            )
            self.settings = settings_of(
                machine,
                target_page_bits=target_page_bits,
                uuid=uuid,
                ignore_shared=left_out is not None,
            )
            self._names = [core_name(spec.name) for spec in self.specs]
            self._blocks = [_core_block(spec.length, spec.page_size) for spec in self.specs]
            self._open(target, DirectIO.OFF)
            self._encoder = _new_encoder(self.target.fd, self.target.offset)
            if self.target.forward:
                _core.lib.qm_encoder_go_forward(self._encoder)

    def _open(self, target: Target, direct_io: DirectIO) -> None:
        if goes_forward(target):
            self.target = ForwardOutput(target)
            self._cleanup.callback(self.target.abort)
        else:
            super()._open(target, direct_io)

    def _file_size(self) -> int:
        return int(_core.lib.qm_encoder_position(self._encoder))

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
        fault = _new_fault()
        self._check(_core.lib.qm_encoder_flush(self.channels.core, self._encoder, fault), fault)
        if self.reuse:
            self.target.set_size(_core.lib.qm_encoder_position(self._encoder))
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
        counter = _new_encoder(-1, 0)
        self._pass(self.channels.sibling("pyqmigrate-count"), counter, None)
        return int(_core.lib.qm_encoder_position(counter))

    def _pass(self, channels: Channels, encoder: Any, selections: Sequence[Bitmap] | None) -> None:
        common = [
            (
                encoder,
                name[0],
                block,
                memory.core,
                selections[n].core if selections else _core.ffi.NULL,
            )
            for n, (name, block, memory) in enumerate(
                zip(self._names, self._blocks, self.memories, strict=True)
            )
        ]

        def move(channel: Any, item: Range, fault: Any) -> int:
            return _core.lib.qm_encode_pages(
                channels.core, channel, *common[item.block], item.first, item.npages, fault
            )

        self._put(encoder, encode_part_header())
        _core.lib.qm_encoder_forget_block(encoder)
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

    def _put(self, encoder: Any, data: bytes) -> None:
        fault = _new_fault()
        self._check(
            _core.lib.qm_encoder_put(self.channels.core, encoder, data, len(data), fault), fault
        )

    def _check(self, rc: int, fault: Any) -> None:
        if rc:
            raise stream_error(rc, fault, "cannot write the stream", self.target.name)

    def _direct_io_reason(self) -> str:
        return _BUFFERED


_RECORD = 8 + 1  # bytes of a record beside its page: the word, and a zero page's filling


def _new_encoder(fd: int, at: int) -> Any:
    encoder = _core.lib.qm_encoder_create(fd, at)
    if encoder == _core.ffi.NULL:
        raise MemoryError
    return _core.ffi.gc(encoder, _core.lib.qm_encoder_destroy)


def _new_fault() -> Any:
    return _core.ffi.new("struct qm_fault *")


def _core_block(length: int, page_size: int) -> Any:
    block = _core.ffi.new("struct qm_block *")
    block.len, block.page_size = length, page_size
    return block


def stream_error(rc: int, fault: Any, what: str, target: str) -> PyqmigrateError:
    """Return the exception for a negative return of the core that concerns the stream's file."""
    number = -rc
    if number == errno.ECANCELED:
        return Cancelled("cancelled")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(what, target, errno=number, position=fault.at)
    return TargetError(number, what, target, position=fault.at)


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


class RecordDecoder:
    """The core's decoder of the records of these blocks, and their ``struct qm_record_block[]``.

    Set the destination of each block in ``core`` before :meth:`start`.
    """

    def __init__(self, blocks: Sequence[ListedBlock], page_size: int) -> None:
        self.blocks = blocks
        self.page_size = page_size
        self._names = [core_name(block.name) for block in blocks]
        self.core = _core.ffi.new("struct qm_record_block[]", len(blocks))
        for record, block, name in zip(self.core, blocks, self._names, strict=True):
            record.name, record.len = name[0][0], block.length
        self.decoder: Any = None

    def start(self, *, fresh: bool = True) -> None:
        """``fresh`` as in the core's ``qm_decoder_create``."""
        decoder = _core.lib.qm_decoder_create(self.core, len(self.blocks), self.page_size, fresh)
        if decoder == _core.ffi.NULL:
            raise MemoryError
        self.decoder = _core.ffi.gc(decoder, _core.lib.qm_decoder_destroy)

    def read(self, source: Source, channels: Channels, offset: int) -> int:
        """Read the body of records at ``offset``; return where it ends.

        Raises SnapshotError, NotSupported, TargetError, Cancelled.
        """
        at, fault = _core.ffi.new("int64_t *", offset), _new_fault()
        rc = read_body(channels, self.decoder, source, at, fault)
        if rc < 0:
            raise self.error(rc, fault, source, int(at[0]))
        return int(at[0])

    def error(self, rc: int, fault: Any, source: Source, offset: int) -> PyqmigrateError:
        """Return the exception for a negative return that concerns the stream's file."""
        if rc == -errno.EBADMSG:
            return record_error(self.decoder, self.blocks, self.page_size)
        if rc == -errno.ENODATA:
            return SnapshotTruncated(
                "the file ends within RAM's pages: it was cut short, or the save did not finish",
                offset=offset,
            )
        return stream_error(rc, fault, "cannot read the stream", source.name)


def read_body(channels: Channels, decoder: Any, source: Source, at: Any, fault: Any) -> int:
    """Call the core's ``qm_decode_file``, or its equivalent for a forward-only source."""
    if not source.forward:
        return int(
            _core.lib.qm_decode_file(channels.core, decoder, source.fd, at, source.size, fault)
        )
    used = _core.ffi.new("size_t *")
    while True:
        data = source.read_once(int(at[0]))
        if not data:
            fault.in_memory = 0
            return -errno.ENODATA
        _core.lib.qm_decoder_seek(decoder, at[0])
        rc = int(
            _core.lib.qm_decode(
                channels.core, decoder, _core.ffi.from_buffer(data), len(data), used, fault
            )
        )
        at[0] += used[0]
        _core.lib.qm_job_count_io(channels.core, used[0], 0)
        if rc == 1:
            source.keep_from(int(at[0]))
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
        for core, block in zip(records.core, self.blocks, strict=True):
            if block.name in loads:
                memory, bitmap = loads[block.name]
                core.memory, core.seen = memory.core, bitmap.core
        records.start(fresh=self.clear is Clear.ZERO)
        return records

    def _read_records(self, offset: int) -> int:
        at, fault = _core.ffi.new("int64_t *", offset), _new_fault()
        rc = read_body(self.channels, self._records.decoder, self.source, at, fault)
        if rc < 0 and fault.in_memory and rc != -errno.EBADMSG:
            raise failure(rc, fault, self.source.name, self.blocks[fault.block].name)
        if rc < 0:
            raise self._records.error(rc, fault, self.source, int(at[0]))
        return int(at[0])

    def _clear_rest(self, stream: SequentialStream) -> set[str]:
        """Zero the pages that no record mentioned; return the blocks stored in other files."""
        elsewhere = set()
        for block, memory, bitmap in self._loads:
            if stream.ignore_shared and bitmap.last() < 0:
                elsewhere.add(block.name)
            elif self.clear is Clear.ZERO:
                fault = _new_fault()
                rc = _core.lib.qm_zero_clear(
                    self.channels.core,
                    _core_block(block.length, self.page_size),
                    memory.core,
                    bitmap.core,
                    fault,
                )
                if rc:
                    raise failure(rc, fault, self.source.name, block.name)
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


def record_error(decoder: Any, blocks: Sequence[ListedBlock], page_size: int) -> PyqmigrateError:
    """Return the exception for the record at which ``decoder`` stopped."""
    error = _core.ffi.new("struct qm_record_error *")
    _core.lib.qm_decoder_error(decoder, error)
    what, word, at = error.what, int(error.word), int(error.at)
    unable = {
        _core.lib.QM_RECORD_COMPRESSED: "a compressed page, as QEMU wrote until 9.0",
        _core.lib.QM_RECORD_MULTIFD: "a multifd stream without mapped-ram: its pages went over other channels",
        _core.lib.QM_RECORD_CHANGES: f"more than {_core.lib.QM_CHANGES_MAX} changes to one page: too many for an index",
    }
    if what in unable:
        return NotSupported(f"{unable[what]} (file offset {at:#x})")
    block = blocks[error.block].name if error.block >= 0 else None
    if what == _core.lib.QM_RECORD_UNKNOWN:
        block = bytes(error.name[0 : error.name_len]).decode("utf-8", "surrogateescape")
    message, field = {
        _core.lib.QM_RECORD_FLAGS: (f"invalid flags {word:#x} in a page record", "flags"),
        _core.lib.QM_RECORD_NO_BLOCK: (
            "page record has CONTINUE but no block came before it",
            "name",
        ),
        _core.lib.QM_RECORD_UNKNOWN: ("a page record for a block that is not listed", "name"),
        _core.lib.QM_RECORD_OUTSIDE: (
            f"page at {word & -page_size:#x}, outside of its block",
            "offset",
        ),
        _core.lib.QM_RECORD_DELTA: ("the change to a page does not fit it", "xbzrle"),
        _core.lib.QM_RECORD_SCATTERED: ("pages too sparse for a real guest", "offset"),
    }[what]
    return SnapshotError(message, offset=at, block=block, field=field)
