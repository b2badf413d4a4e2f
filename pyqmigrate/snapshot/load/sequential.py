"""Load a sequential stream: what QEMU writes with ``file:`` and without mapped-ram.

    stream_file = StreamFile.open("/snap/guest")
    report = start_sequential_load(stream_file, {"pc.ram": buffer}).wait()

Pages come in the order in which they were saved, and a page can come again: a reader has to read
everything, front to back.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pyqmigrate.core import Block, Fault, Transfer, error_from_fault
from pyqmigrate.enums import Clear, parse_enum
from pyqmigrate.errors import NotSupported
from pyqmigrate.format.device.sections import DeviceSection
from pyqmigrate.format.stream.sequential import (
    ListedBlock,
    SequentialStream,
    SequentialStreamReader,
)
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.job import Job
from pyqmigrate.io.memory import Memory, OpenMemory
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.log import logger
from pyqmigrate.snapshot.load.mapped_ram import LoadReport
from pyqmigrate.snapshot.load.memories import match_memories, open_memory
from pyqmigrate.snapshot.records import PolledSource, RecordDecoder, read_body

__all__ = ["LOADED_STATE_MAX", "SequentialLoadReport", "SequentialReader", "start_sequential_load"]

LOADED_STATE_MAX = 256 << 20  # bytes of device sections that a load hands back

_BUFFERED = "a sequential stream goes through the page cache"


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
