"""The types in descriptions, and the decoding of their bytes.

All numbers are big-endian, for every host and guest. Some names mislead: ``int32 le`` means that a
loading QEMU accepts values less than or equal to its own, and ``equal`` that it requires its own.
Other types are private to their devices.
"""

from __future__ import annotations

import array
import struct
from dataclasses import dataclass

from pyqmigrate.format.device.values import Scalar

__all__ = ["GTREE", "LISTS", "VECTORS", "decode_array", "decode_one", "width"]


@dataclass(frozen=True, slots=True)
class _Number:
    code: str  # of the module struct
    width: int


_U8, _U16, _U32, _U64 = (_Number(c, w) for c, w in zip("BHIQ", (1, 2, 4, 8), strict=True))
_S8, _S16, _S32, _S64 = (_Number(c, w) for c, w in zip("bhiq", (1, 2, 4, 8), strict=True))

_NUMBERS = {
    "uint8": _U8,
    "uint8 equal": _U8,
    "uint16": _U16,
    "uint16 equal": _U16,
    "uint32": _U32,
    "uint32 equal": _U32,
    "uint64": _U64,
    "uint64 equal": _U64,
    "int8": _S8,
    "int16": _S16,
    "int32": _S32,
    "int32 equal": _S32,
    "int32 le": _S32,
    "int64": _S64,
    "int64 equal": _S64,
    "timer": _S64,  # when it is due, ns of its clock; -1 is never
    "CPU_Double_U": _U64,  # the bits of a double
    "cpsr": _U32,
    "fpscr": _U32,  # Arm; the first is PSTATE in AArch64
}
_BOOLS = {"bool", "powered_off"}

# A null pointer in an array of pointers: one byte, under either name (until 9.2 the second).
_NULL_TYPES = {"nullptr", "uint64"}
_NULL_BYTE = b"0"

_BYTES = frozenset({"buffer", "unused_buffer", "pci config"})
GTREE = "gtree"
LISTS = frozenset({"qtailq", "qlist", GTREE})
VECTORS = {"pci irq state": ("uint32", 4)}  # one field that is an array of another type


def width(kind: str, size: int) -> int | None:
    """Return the size of a value of type ``kind``, described with ``size``; None if it varies."""
    if kind in _BOOLS or (kind in _NULL_TYPES and size == len(_NULL_BYTE)):
        return 1
    number = _NUMBERS.get(kind)
    return number.width if number else None


def decode_one(kind: str, data: bytes) -> tuple[Scalar, bool]:
    """Return the value of ``data``, and whether the type is known; otherwise return ``data``."""
    if kind in _BYTES:
        return data, True
    if kind in _BOOLS and len(data) == 1:
        return _BOOLEANS[data[0]], True
    if kind == "bitmap" and len(data) % 8 == 0:
        return _bitmap(data), True
    if kind in _NULL_TYPES and data == _NULL_BYTE:
        return None, True
    number = _NUMBERS.get(kind)
    if number and number.width == len(data):
        value: int = struct.unpack(">" + number.code, data)[0]
        return value, True
    return data, False


def decode_array(kind: str, data: bytes, count: int) -> tuple[bytes | tuple[Scalar, ...], bool]:
    """Do what :func:`decode_one` does for ``count`` values of equal size."""
    size = len(data) // count if count else 0
    if kind == "uint8" and size == 1:
        return data, True
    number = _NUMBERS.get(kind)
    if number and number.width == size:
        return struct.unpack(f">{count}{number.code}", data), True
    if kind in _BOOLS and size == 1:
        return tuple(_BOOLEANS[byte] for byte in data), True
    values = [decode_one(kind, data[at : at + size]) for at in range(0, len(data), size or 1)]
    return tuple(value for value, _ in values), all(known for _, known in values)


_BOOLEANS: tuple[int | bool, ...] = (False, True, *range(2, 256))


def _bitmap(data: bytes) -> bytes:
    """Convert big-endian 64-bit words, lowest bits first, to bytes with the low bits first."""
    words = array.array("Q", data)
    words.byteswap()
    return words.tobytes()
