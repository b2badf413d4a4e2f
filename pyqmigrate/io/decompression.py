"""A compressed stream, decompressed as it is read: a whole file, or the rest of libvirt's image.

gzip, bzip2 and xz are read with Python's own library, zstd with that of Python 3.14 and later or
with ``zstandard``. Memory is bounded: the output is made a MiB at a time, and the window of a format
is limited.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import shlex
import zlib
from collections.abc import Callable
from typing import IO, Any, Protocol, cast

from pyqmigrate.errors import NotSupported, PyqmigrateError, SnapshotError
from pyqmigrate.format.compression import Compression
from pyqmigrate.io.input import Source
from pyqmigrate.io.pipe import ForwardInput, Read

__all__ = ["decompressed"]

_PIECE = 256 << 10  # bytes of compressed data at a time
_WINDOW_MAX = 256 << 20  # bytes of memory that a decompressor may take: xz -9 wants 65 MiB


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


def decompressed(source: Source, compression: Compression, offset: int) -> ForwardInput:
    """Return the stream that is compressed from ``offset`` on, as a source that owns ``source``.

    Raises NotSupported if no library here decompresses it.
    """
    make, errors = _library(compression, source.name, offset)

    def start() -> Read:
        source.rewind()
        return _Output(_Compressed(source, offset), make, errors)

    return ForwardInput(source.name, start, source.close, again=source.repeatable, beneath=source)


_Make = Callable[["_Compressed"], _Reader]


def _library(
    compression: Compression, name: str, offset: int
) -> tuple[_Make, tuple[type[Exception], ...]]:
    """Return what makes a reader of compressed bytes, and what that raises for damaged ones."""
    if compression is Compression.GZIP:
        return lambda below: gzip.GzipFile(fileobj=cast("IO[bytes]", below), mode="rb"), ()
    if compression is Compression.BZIP2:
        return lambda below: _Members(below, bz2.BZ2Decompressor), ()
    if compression is Compression.XZ:

        def xz() -> lzma.LZMADecompressor:
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_WINDOW_MAX)

        return lambda below: _Members(below, xz), ()
    needed = ""
    if compression is Compression.ZSTD:
        found = _zstd()
        if found is not None:
            return found
        needed = ": pip install zstandard"
    skipped = f"tail -c +{offset + 1} {shlex.quote(name)} | " if offset else ""
    given = "" if offset else f" {shlex.quote(name)}"
    raise NotSupported(
        f"the stream from file offset {offset} on is compressed ({compression}), which cannot be"
        f" read here{needed}; by hand: {skipped}{compression} -dc{given} |"
        " pyqmigrate convert - OUT --to mapped-ram"
    )


def _zstd() -> tuple[_Make, tuple[type[Exception], ...]] | None:
    try:
        own: Any = importlib.import_module("compression.zstd")
    except ImportError:
        pass
    else:
        options = {own.DecompressionParameter.window_log_max: _WINDOW_MAX.bit_length() - 1}
        return (
            lambda below: _Members(below, lambda: own.ZstdDecompressor(options=options)),
            (own.ZstdError,),
        )
    try:
        library: Any = importlib.import_module("zstandard")
    except ImportError:
        return None
    return (
        lambda below: library.ZstdDecompressor(max_window_size=_WINDOW_MAX).stream_reader(
            below, read_size=_PIECE, read_across_frames=True
        ),
        (library.ZstdError,),
    )


class _Compressed:
    """The compressed bytes, as a read-only file object."""

    def __init__(self, image: Source, offset: int) -> None:
        self._image, self._offset = image, offset

    def read(self, size: int = _PIECE, /) -> bytes:
        data = self._image.read_once(self._offset, size)
        self._offset += len(data)
        return data

    def poll(self, stop: Callable[[], bool]) -> None:
        self._image.poll_with(stop)


class _Members:
    """Compressed streams one after another, read with decompressors of Python's library."""

    def __init__(self, below: _Compressed, make: Callable[[], Any]) -> None:
        self._below, self._make = below, make
        self._member = make()
        self._data = b""

    def read(self, size: int, /) -> bytes:
        while True:
            if self._member.eof:
                self._data = self._member.unused_data or self._below.read()
                if not self._data:
                    return b""
                self._member = self._make()
            elif self._member.needs_input:
                self._data = self._below.read()
                if not self._data:
                    raise EOFError("the end mark is missing")
            data, self._data = self._data, b""
            out: bytes = self._member.decompress(data, size)
            if out:
                return out


class _Output:
    """The decompressed stream, see :data:`~pyqmigrate.io.pipe.Read`."""

    def __init__(
        self, below: _Compressed, make: _Make, errors: tuple[type[Exception], ...]
    ) -> None:
        self._below = below
        self._reader = make(below)
        self._errors: tuple[type[Exception], ...] = (
            zlib.error,
            lzma.LZMAError,
            OSError,
            EOFError,
            ValueError,
            *errors,
        )

    def __call__(self, length: int, stop: Callable[[], bool]) -> bytes:
        self._below.poll(stop)
        parts, have = [], 0
        try:
            while have < length and (part := self._reader.read(length - have)):
                parts.append(part)
                have += len(part)
        except PyqmigrateError:
            raise
        except self._errors as error:
            raise SnapshotError(f"the compressed stream is damaged: {error}") from error
        return b"".join(parts)
