"""Guest-physical memory read back from the files that exports make."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from elftools.elf.elffile import ELFFile

__all__ = ["Note", "Physical"]


@dataclass(frozen=True)
class Note:
    """A note of an ELF file."""

    name: str
    kind: int
    content: bytes


@dataclass(frozen=True)
class Physical:
    """Ranges of memory by guest-physical address: where in ``path`` they stand, how long they are.

    ``notes`` and ``machine`` are those of an ELF file.
    """

    path: Path
    ranges: dict[int, tuple[int, int]]
    notes: tuple[Note, ...] = ()
    machine: str = ""

    @classmethod
    def of_elf(cls, path: Path) -> Self:
        with path.open("rb") as file:
            elf = ELFFile(file)
            assert (elf["e_type"], elf.elfclass) == ("ET_CORE", 64)
            ranges, notes = {}, b""
            for segment in elf.iter_segments():
                head = segment.header
                if head.p_type == "PT_LOAD":
                    assert head.p_vaddr == head.p_paddr
                    assert head.p_filesz == head.p_memsz
                    ranges[head.p_paddr] = (head.p_offset, head.p_filesz)
                elif head.p_type == "PT_NOTE":
                    notes += segment.data()
            order = "<" if elf.little_endian else ">"
            return cls(path, ranges, tuple(_notes(notes, order)), elf["e_machine"])

    @classmethod
    def of_lime(cls, path: Path) -> Self:
        """By the words of the format, without the package's own decoder."""
        ranges, at, size = {}, 0, path.stat().st_size
        with path.open("rb") as file:
            while at < size:
                file.seek(at)
                head = file.read(32)
                magic, version, first, last = struct.unpack("<4sIQQ8x", head)
                assert (magic, version, head[24:]) == (b"EMiL", 1, bytes(8))
                ranges[first] = (at + 32, last - first + 1)
                at += 32 + ranges[first][1]
        assert at == size
        assert list(ranges) == sorted(ranges)
        return cls(path, ranges)

    @property
    def lengths(self) -> dict[int, int]:
        """The length of each range by its address."""
        return {address: length for address, (_, length) in self.ranges.items()}

    def read(self, address: int, length: int) -> bytes:
        """Memory that is in one range."""
        [(start, position)] = [
            (start, position)
            for start, (position, size) in self.ranges.items()
            if start <= address and address + length <= start + size
        ]
        with self.path.open("rb") as file:
            file.seek(position + address - start)
            data = file.read(length)
        assert len(data) == length, "the file ends early"
        return data

    def all(self) -> dict[int, bytes]:
        """The content of every range by its address; of small files only."""
        return {address: self.read(address, size) for address, size in self.lengths.items()}


def _notes(data: bytes, order: str) -> list[Note]:
    found, at = [], 0
    while at < len(data):
        name, content, kind = struct.unpack_from(f"{order}III", data, at)
        at += 12
        owner = data[at : at + name]
        at += -(-name // 4) * 4
        found.append(Note(owner.rstrip(b"\0").decode(), kind, data[at : at + content]))
        at += -(-content // 4) * 4
    return found
