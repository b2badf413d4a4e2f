"""Snapshots that arrive through a pipe."""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zstandard

from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header

__all__ = ["COMPRESS", "front", "pipe_of"]

COMPRESS: dict[ImageFormat, Callable[[bytes], bytes]] = {
    ImageFormat.GZIP: functools.partial(gzip.compress, compresslevel=1),
    ImageFormat.BZIP2: functools.partial(bz2.compress, compresslevel=1),
    ImageFormat.XZ: functools.partial(lzma.compress, preset=0),
    ImageFormat.ZSTD: zstandard.compress,
}


def front(form: ImageFormat) -> bytes:
    return encode_header(LibvirtHeader(True, 2, form, True, "<domain/>", "<c/>", 4321, "little"))


@contextmanager
def pipe_of(data: bytes, piece: int = 1 << 16) -> Iterator[str]:
    """The path of a pipe through which the bytes come, in pieces."""
    read_end, write_end = os.pipe()

    def write() -> None:
        try:
            for at in range(0, len(data), piece):
                os.write(write_end, data[at : at + piece])
        except BrokenPipeError:
            pass
        finally:
            os.close(write_end)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield f"/proc/self/fd/{read_end}"
    finally:
        os.close(read_end)
        thread.join()
