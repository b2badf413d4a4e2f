"""Page records of a post-copy migration: one for each page, in short PARTs.

A record is a word, ``u64 offset | flags``, a block's name unless it continues with that of the record
before, and the page; of a zero page only the byte 0. QEMU holds a lock while it reads a PART, so PARTs are
short. All records of one page of the destination's memory are in order in one PART.

The core encodes them (``csrc/postcopy.c``), between :data:`PART_HEADER` and :data:`PART_END`.
"""

from __future__ import annotations

from pyqmigrate.format.stream.writer import RAM_EOS, encode_part_header

__all__ = ["PART_END", "PART_HEADER", "RecordData"]

RecordData = bytes | bytearray | memoryview

PART_HEADER = encode_part_header()
PART_END = RAM_EOS
