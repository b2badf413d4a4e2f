"""A RAM block that is to be written, checked."""

from __future__ import annotations

from dataclasses import dataclass

from pyqmigrate.errors import UsageError
from pyqmigrate.format.stream.mapped_ram import size_fault

__all__ = ["BlockSpec"]

_NAME_MAX = 255  # bytes


@dataclass(frozen=True)
class BlockSpec:
    """A RAM block to be written: its name, and length and page size in bytes.

    ``address`` is the guest physical address, which only a stream with ``x-ignore-shared`` records:
    QEMU refuses an external block unless it has the same address.

    Raises :class:`UsageError` unless the name has 1 to 255 bytes (UTF-8, undecodable bytes as
    surrogate escapes), the page size is a power of two from 1024 to 65536, the length is a
    positive multiple of it, and the address is a number of 64 bits.
    """

    name: str
    length: int
    page_size: int = 4096
    address: int = 0

    def __post_init__(self) -> None:
        try:
            size = len(self.name.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise UsageError(f"block name {self.name!r} cannot be written as UTF-8") from error
        if not 1 <= size <= _NAME_MAX:
            raise UsageError(f"block name {self.name!r} has {size} bytes; 1 to 255 are possible")
        fault = size_fault(self.length, self.page_size)
        if fault is not None:
            raise UsageError(f"block {self.name!r}: {fault}")
        if not 0 <= self.address < 1 << 64:
            raise UsageError(f"block {self.name!r}: {self.address} is not a guest address")
