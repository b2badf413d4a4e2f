"""An open file and the migration stream in it: what is opened once, and then handed on.

    with contextlib.closing(StreamFile.open("/var/lib/libvirt/save/guest")) as stream_file:
        print(stream_file.offset, stream_file.configuration.machine)

A stream starts at the start of its file, at an offset, or behind the header of libvirt's or of an
increment (:mod:`pyqmigrate.format.increment`). A compressed
stream, also in a compressed image of libvirt's, is decompressed as it is read: its source is
forward-only then, like that of a pipe (:mod:`pyqmigrate.io.pipe`).
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Self

from pyqmigrate.argument_types import check
from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.compression import MAGIC_MAX, Compression
from pyqmigrate.format.libvirt import MAGIC_LENGTH, LibvirtHeader, is_libvirt, read_header
from pyqmigrate.format.stream.configuration import Configuration
from pyqmigrate.format.stream.start import StreamStart, read_start
from pyqmigrate.format.stream.wire import MAGIC
from pyqmigrate.io.input import InputFile, Source
from pyqmigrate.io.target import Descriptors, Target

if TYPE_CHECKING:
    from pyqmigrate.format.increment import IncrementHeader

__all__ = ["StreamFile", "open_source", "read_libvirt_header"]

_INCREMENT_STARTS = b"QM"  # the first bytes of its magic


class StreamFile:
    """An open source and the stream that starts at ``offset`` bytes of it. Close it.

    ``libvirt`` is libvirt's header before the stream, ``increment`` that of an increment, or None.
    """

    def __init__(
        self,
        source: Source,
        offset: int = 0,
        libvirt: LibvirtHeader | None = None,
        increment: IncrementHeader | None = None,
    ) -> None:
        """Take what is known already; :meth:`open` and :meth:`find` look at the file."""
        self.source = source
        self.offset = offset
        self.libvirt = libvirt
        self.increment = increment
        self._owned = True

    @classmethod
    def open(cls, target: Target, *, offset: int | None = None, allow_pipe: bool = False) -> Self:
        """Open a file and find its stream.

        target: a path, a ``file:`` URI or Descriptors (borrowed, open for reading).
        offset: where the stream starts, bytes, for a path. Without it libvirt's header is looked
            for at the start of the file.
        allow_pipe: whether the path of a pipe or socket is accepted.

        Raises the errors of :meth:`find`; UsageError, TargetError.
        """
        check("offset", offset, int, type(None))
        check("allow_pipe", allow_pipe, bool)
        source = open_source(target, allow_pipe=allow_pipe)
        try:
            if offset is not None and (isinstance(target, Descriptors) or source.offset):
                raise UsageError("the offset is given twice")
        except BaseException:
            source.close()
            raise
        return cls.find(source, offset)

    @classmethod
    def find(cls, source: Source, offset: int | None = None) -> Self:
        """Find the stream in an open source, which the result owns; it is closed if this fails.

        Raises SnapshotError for a save image that libvirt did not finish and for an increment with a
        damaged header, NotSupported for a stream that is compressed in a way that cannot be read
        here, and for a file of another known kind (a disk image, a core), which the message names;
        UsageError, also for the offset of an increment's stream; TargetError.
        """
        try:
            start = source.offset if offset is None else offset
            if not 0 <= start < 1 << 63:
                raise UsageError(f"offset {start} is not a file position")
            source, start = _decompressed(source, start)
            header = None if offset is not None or start else read_libvirt_header(source)
            if header is not None:
                source, start = _behind(header, source)
            increment = _read_increment(source, start)
            if increment is not None:
                start = increment.stream_offset
            else:
                _refuse_foreign(source, start)
        except BaseException:
            source.close()
            raise
        return cls(source, start, header, increment)

    @functools.cached_property
    def start(self) -> StreamStart:
        """The start of the stream, parsed on first use.

        Raises SnapshotError for anything that is not a migration stream, NotSupported.
        """
        return read_start(self.source, self.offset)

    @property
    def configuration(self) -> Configuration:
        """The configuration of the stream; raises the errors of :attr:`start`."""
        return self.start.configuration

    def share(self) -> StreamFile:
        """Return the same open file for a second reader, which does not close it."""
        shared = StreamFile(self.source, self.offset, self.libvirt, self.increment)
        shared._owned = False
        return shared

    def without_header(self) -> StreamFile:
        """Return the stream alone, to read what an increment contains without its base; the result
        closes the file instead of this object."""
        bare = StreamFile(self.source, self.offset)
        bare._owned, self._owned = self._owned, False
        return bare

    def close(self) -> None:
        """Close the file, unless it is shared. Idempotent."""
        if self._owned:
            self.source.close()


def open_source(target: Target, *, allow_pipe: bool = False) -> Source:
    """Open a file or block device, or with ``allow_pipe`` the path of a pipe or socket."""
    if allow_pipe and isinstance(target, str | os.PathLike):
        from pyqmigrate.io.pipe import ForwardInput, PipeReader

        path = os.fsdecode(target)
        if PipeReader.is_pipe(path):
            pipe = PipeReader(path)
            return ForwardInput(path, lambda: pipe, pipe.close)
    return InputFile(target)


def read_libvirt_header(source: Source) -> LibvirtHeader | None:
    """Read libvirt's header at the start of a source; None if there is none.

    The header of an incomplete image is returned too. Raises SnapshotError for a damaged one.
    """
    return read_header(source) if is_libvirt(source.read_at(0, MAGIC_LENGTH)) else None


def _behind(header: LibvirtHeader, source: Source) -> tuple[Source, int]:
    """Return the source of the stream behind libvirt's header, and where it starts."""
    if not header.complete:
        raise SnapshotError("libvirt did not finish this save image", offset=0)
    if not header.format.compressed:
        return source, header.stream_offset
    compression = Compression(header.format.name.lower())
    return _decompress(source, compression, header.stream_offset), 0


def _read_increment(source: Source, start: int) -> IncrementHeader | None:
    if source.read_at(0, len(_INCREMENT_STARTS)) != _INCREMENT_STARTS:
        return None
    # A restore has no time for modules that only other files need.
    from pyqmigrate.format.increment import MAGIC as INCREMENT
    from pyqmigrate.format.increment import IncrementHeader

    if source.read_at(0, len(INCREMENT)) != INCREMENT:
        return None
    if start:
        raise UsageError(
            f"{source.name!r} is an increment, which has no stream by itself: give no offset"
        )
    return IncrementHeader.read(source)


def _refuse_foreign(source: Source, offset: int) -> None:
    if source.read_at(offset, len(MAGIC)) != MAGIC:
        # A restore has no time for modules that only other files need.
        from pyqmigrate.format.foreign import recognize

        foreign = recognize(source, offset)
        if foreign is not None:
            raise NotSupported(str(foreign))


def _decompressed(source: Source, offset: int) -> tuple[Source, int]:
    """Return the source, and where its stream starts; if all of it is compressed, its output."""
    compression = Compression.of(source.read_at(offset, MAGIC_MAX))
    if compression is None:
        return source, offset
    return _decompress(source, compression, offset), 0


def _decompress(source: Source, compression: Compression, offset: int) -> Source:
    # Seldom needed, and a restore has no time for it.
    from pyqmigrate.io.decompression import decompressed

    return decompressed(source, compression, offset)
