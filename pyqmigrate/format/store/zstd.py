"""Frames of zstd whose length is known before they are decompressed."""

from __future__ import annotations

import threading
from typing import Any

from pyqmigrate.errors import NotSupported
from pyqmigrate.format.digest import Data

__all__ = ["compress", "decompress"]

_local = threading.local()  # contexts are not for two threads at once
_WINDOW_MAX = 1 << 27  # bytes; level 1 to 3 uses far less


def compress(data: Data, level: int) -> bytes:
    """Return a frame that records its content's length. Without the GIL, for any thread."""
    compressors: dict[int, Any] = _local.__dict__.setdefault("compressors", {})
    if level not in compressors:
        compressors[level] = _library().ZstdCompressor(level=level)
    frame: bytes = compressors[level].compress(data)
    return frame


def decompress(frame: Data, length: int) -> bytes:
    """Return the content of one frame, which has ``length`` bytes. Without the GIL, for any thread.

    Raises ValueError if the frame is damaged, of another length, or followed by other bytes. Memory
    is ``length`` and the window at most, whatever the frame claims.
    """
    library = _library()
    try:
        if library.frame_content_size(frame) != length:
            raise ValueError(f"a frame of another length than {length} bytes")
        if length == 0:  # the library returns nothing for such a frame without looking at it
            return b""
        decompressor = getattr(_local, "decompressor", None)
        if decompressor is None:
            decompressor = library.ZstdDecompressor(max_window_size=_WINDOW_MAX)
            _local.decompressor = decompressor
        content: bytes = decompressor.decompress(
            frame, max_output_size=length, allow_extra_data=False
        )
    except library.ZstdError as error:
        raise ValueError(f"a damaged frame ({error})") from error
    if len(content) != length:
        raise ValueError(f"{len(content)} bytes in a frame of {length}")
    return content


def _library() -> Any:
    try:
        import zstandard
    except ImportError:
        raise NotSupported("a store needs the package zstandard: pip install zstandard") from None
    return zstandard
