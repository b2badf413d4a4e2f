"""Digests of the parts of a file that fit its seal, so that what is read again is compared quickly.

A seal has a digest for each MiB. Once a MiB fits, the digests of its units of 4096 bytes are kept, and a
unit that is read later is compared with its own: 16 bytes of memory a unit, allocated when they are used.
"""

from __future__ import annotations

from typing import Any

import pyqmigrate._core as _core
from pyqmigrate.format.digest import DIGEST_SIZE, Data
from pyqmigrate.format.seal import PIECE
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.page_digests import DigestTable

__all__ = ["UNIT", "CheckedPages"]

UNIT = 4096


class CheckedPages:
    """The units of a file of ``size`` bytes; for one thread. Raises NotSupported without enough memory.

    ``table`` and ``pieces``, which MiB of the file have been checked, are read by the core, too.
    """

    unit = UNIT

    def __init__(self, size: int) -> None:
        self.table = DigestTable(-(-size // UNIT))
        self.pieces = Bitmap(-(-size // PIECE))

    def enter(self, piece: int, data: Data) -> None:
        """Enter MiB number ``piece``, whose bytes fit the seal."""
        self.table.enter(piece * PIECE // UNIT, _padded(data), UNIT)
        self.pieces.add_range(piece, piece + 1)

    def forget(self, piece: int) -> None:
        """Have MiB number ``piece`` checked as a whole the next time."""
        self.pieces.remove_range(piece, piece + 1)

    def fits(self, offset: int, data: Data) -> bool:
        """Return whether bytes of checked MiB are as they were. ``offset`` is a multiple of 4096; the data
        ends at one, or at the end of the file."""
        whole = _padded(data)
        npages = len(whole) // UNIT
        found = _core.ffi.new("unsigned char[]", npages * DIGEST_SIZE)
        with _core.ffi.from_buffer(whole) as pages:
            _core.lib.qm_digest_bytes(pages, npages, UNIT, found)
        start = offset // UNIT * DIGEST_SIZE
        known: Any = _core.ffi.buffer(self.table.core + start, npages * DIGEST_SIZE)
        return bytes(known) == bytes(_core.ffi.buffer(found, npages * DIGEST_SIZE))

    def close(self) -> None:
        """Free the memory. Idempotent."""
        if self.table.core is not None:
            self.table.close()
        self.pieces.close()


def _padded(data: Data) -> Data:
    rest = len(data) % UNIT
    return bytes(data) + bytes(UNIT - rest) if rest else data
