"""A local copy of the parts of a snapshot that were read: framing, bitmaps, device state.

Parsers read a file by its descriptor. The copy is a sparse file without a name, so that nothing is
left of it, also after a kill.
"""

from __future__ import annotations

import os
import tempfile

from pyqmigrate.errors import target_error
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.io.target import Descriptors

__all__ = ["PartialCopy"]

_UNIT = 64 << 10  # bytes that are copied together; a unit of zeros stays a hole
_READ = 8 << 20  # bytes of one read
_IN_MEMORY = 64 << 20  # bytes: larger files are copied to a file on disk
_ZEROS = bytes(_UNIT)


class PartialCopy(InputFile):
    """A :class:`~pyqmigrate.io.plain_file.PlainFile`, which is borrowed, as an open file.

    Bytes that :meth:`read_at` or :meth:`fetch` has not read are holes for those who use ``fd``.
    """

    def __init__(self, plain: PlainFile, name: str) -> None:
        """``name`` is for messages. Raises TargetError."""
        try:
            if plain.size <= _IN_MEMORY:
                self._writable = os.memfd_create("pyqmigrate-fleet", os.MFD_CLOEXEC)
            else:
                with tempfile.TemporaryFile() as file:  # it has no name
                    self._writable = os.dup(file.fileno())
        except OSError as error:
            raise target_error(error, "cannot make a file in", tempfile.gettempdir()) from error
        self._plain = plain
        self._have = bytearray(-(-plain.size // _UNIT))
        try:
            os.ftruncate(self._writable, plain.size)
            super().__init__(Descriptors(self._writable))
        except OSError as error:
            os.close(self._writable)
            raise target_error(error, "cannot copy", name) from error
        except BaseException:
            os.close(self._writable)
            raise
        self.name = name

    def read_at(self, offset: int, length: int) -> bytes:
        self.fetch(offset, length)
        return super().read_at(offset, length)

    def fetch(self, offset: int, length: int) -> None:
        """Copy these bytes, unless they are there. Raises TargetError (NoSpace)."""
        end = min(-(-(offset + length) // _UNIT), len(self._have))
        unit = self._have.find(0, offset // _UNIT, end)
        while unit >= 0:
            stop = self._have.find(1, unit, end)
            stop = min(end if stop < 0 else stop, unit + _READ // _UNIT)
            self._copy(unit * _UNIT, min(stop * _UNIT, self._plain.size))
            self._have[unit:stop] = b"\1" * (stop - unit)
            unit = self._have.find(0, stop, end)

    def fetch_all(self) -> None:
        """Copy all of it; holes stay holes. Raises TargetError (NoSpace)."""
        offset = self._plain.next_data(0)
        while offset is not None:
            end = self._plain.next_hole(offset)
            self.fetch(offset, end - offset)
            offset = self._plain.next_data(end)

    def _copy(self, start: int, end: int) -> None:
        data = memoryview(self._plain.read(start, end - start)).cast("B")
        for offset in range(0, len(data), _UNIT):
            unit = bytes(data[offset : offset + _UNIT])
            if unit != _ZEROS[: len(unit)]:
                self._write(memoryview(unit), start + offset)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            try:
                done = os.pwrite(self._writable, data, offset)
            except OSError as error:
                raise target_error(
                    error, f"cannot copy {self.name!r} to", tempfile.gettempdir()
                ) from error
            data, offset = data[done:], offset + done

    def close(self) -> None:
        super().close()
        if self._writable >= 0:
            os.close(self._writable)
            self._writable = -1
