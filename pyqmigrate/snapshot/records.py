"""Read the page records of a sequential stream, from a file or from a source that comes once."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from pyqmigrate.core import file_error_from_fault
from pyqmigrate.errors import (
    Cancelled,
    NotSupported,
    PyqmigrateError,
    SnapshotError,
    SnapshotTruncated,
)
from pyqmigrate.format.stream.sequential import ListedBlock
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.input import Source
from pyqmigrate.io.records import CHANGES_MAX, Decoded, Decoder, RecordFault

__all__ = ["PolledSource", "RecordDecoder", "read_body", "record_error"]


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
