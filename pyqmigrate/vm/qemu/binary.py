"""Find out what a QEMU executable supports by reading the file, without starting it."""

from __future__ import annotations

import os
import struct

__all__ = ["has_type"]

_ELF64 = b"\x7fELF\x02"
_HEADER = struct.Struct("16sHHIQQQIHHHHHH")  # Elf64_Ehdr
_SECTION = struct.Struct("IIQQQQIIQQ")  # Elf64_Shdr
_PROGBITS, _WRITE, _EXECUTE = 1, 1, 4
_SECTIONS_MAX = 1 << 10
_CONSTANTS_MAX = 16 << 20  # bytes; QEMU 10 and 11 have 2 MiB
_PIECE = 1 << 18  # bytes; two reads overlap
_KNOWN_MAX = 16  # answers
_known: dict[tuple[object, ...], bool] = {}  # by type, and identity of the file


def has_type(executable: str | os.PathLike[str], name: str) -> bool:
    """Return whether a QEMU has the object type ``name``, judging by its executable's constants.

    False for a file that is not a 64-bit ELF of this host's byte order, or cannot be read. The answer
    is remembered as long as the file does not change.
    """
    try:
        fd = os.open(executable, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        info = os.fstat(fd)
        key = (name, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        found = _known.get(key)
        if found is None:
            found = _find(fd, name)
            if len(_known) >= _KNOWN_MAX:
                _known.clear()
            _known[key] = found
        return found
    except (OSError, ValueError, struct.error):
        return False
    finally:
        os.close(fd)


def _find(fd: int, name: str) -> bool:
    wanted = b"\0%s\0" % name.encode()
    # Copied, since page faults of a mapping would take several times as long, and QEMU is waiting.
    return any(
        wanted in os.pread(fd, min(_PIECE + len(wanted), end - offset), offset)
        for start, end in _constants(fd)
        for offset in range(start, end, _PIECE)
    )


def _constants(fd: int) -> list[tuple[int, int]]:
    """Return start and end of each read-only data section, such as ``.rodata``."""
    head = os.pread(fd, _HEADER.size, 0)
    if not head.startswith(_ELF64):
        return []
    header = _HEADER.unpack(head)
    offset, size, count = header[6], header[11], header[12]
    if size != _SECTION.size or count > _SECTIONS_MAX:
        return []
    table = os.pread(fd, size * count, offset)
    sections, left = [], _CONSTANTS_MAX
    for _, kind, flags, _, start, length, *_ in _SECTION.iter_unpack(table):
        if kind == _PROGBITS and not flags & (_WRITE | _EXECUTE) and length <= left:
            sections.append((start, start + length))
            left -= length
    return sections
