"""The manifest of a sealed file: ``SNAPSHOT.seal``, beside it.

One line of JSON, the head, ended by a newline and at most 1 MiB long; then a digest of 16 bytes for
each piece of 1 MiB of the file, in order, and nothing after them. The last piece is shorter where
the file ends within it. Holes are digested as the zeros that they read as. The head is an object
of these keys, in this order; readers step over others between the first and the last::

    format              "pyqmigrate-seal": a seal is known by its first bytes
    version             1
    algorithm           "xxh3-128", "blake3" or "sha256": see pyqmigrate.format.digest
    piece               1048576, bytes
    size                of the file, bytes
    mtime_ns            when the file was last modified: nanoseconds since 1970
    clear_pages_zero    true: every page whose bit is clear reads as zeros in the file; false for a
                        stream that has no bitmaps
    offset              file offset of the stream, bytes
    bitmap_order        "little" or "big": the byte order in which the bitmaps were read; older
                        seals are without it, which is "little"
    blocks              the place of each RAM block, to name the damaged parts even of a file that
                        cannot be parsed any more: a list of objects of name, length, page_size,
                        header, bitmap and pages, the last three file offsets, in the order of
                        the file and without overlaps; empty for a stream that has no bitmaps, and
                        where it would not fit
    digest              32 hexadecimal digits, lower case: the digest of all the digests, one after
                        another, followed by the head's own bytes up to the comma before this key

All of the file has digests, including bytes before and after the stream. ``mtime_ns`` detects that a
file may have changed without reading it; it is not verified.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format import suffixes
from pyqmigrate.format.digest import DIGEST_SIZE, Algorithm, Data, digest_of_all
from pyqmigrate.format.stream.mapped_ram import OFFSET_MAX, PAGE_SIZES, BlockLayout, ByteOrder

__all__ = [
    "HEAD_MAX",
    "PIECE",
    "SEALED_MAX",
    "SUFFIX",
    "SealHead",
    "SealLine",
    "bitmap_places",
    "count_pieces",
    "is_seal",
]

SUFFIX = suffixes.SEAL
PIECE = 1 << 20  # bytes of the file that have one digest
HEAD_MAX = 1 << 20  # bytes, the newline included
SEALED_MAX = 1 << 46  # bytes of a file; what claims more is taken for damage

_FORMAT = "pyqmigrate-seal"
_VERSION = 1
_START = b'{"format": "' + _FORMAT.encode() + b'"'


def count_pieces(size: int) -> int:
    """Return the number of pieces of a file of ``size`` bytes."""
    return -(-size // PIECE)


def is_seal(data: bytes) -> bool:
    """Return whether a file that starts with ``data`` (64 bytes of it) is, or was, a seal."""
    return data.startswith(_START)


@dataclass(frozen=True)
class SealHead:
    """The head of a manifest. ``size`` and ``offset`` in bytes."""

    algorithm: Algorithm
    size: int
    mtime_ns: int
    clear_pages_zero: bool
    offset: int = 0
    blocks: tuple[BlockLayout, ...] = ()
    bitmap_order: ByteOrder = "little"

    @functools.cached_property
    def bitmaps(self) -> list[tuple[int, int, int]]:
        """The result of :func:`bitmap_places` for the blocks."""
        return bitmap_places(self.blocks)

    @property
    def digests_size(self) -> int:
        """The size of all digests in bytes."""
        return count_pieces(self.size) * DIGEST_SIZE

    def encode(self, digests: Data) -> bytes:
        """Return the line, with its newline, for these digests."""
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "algorithm": str(self.algorithm),
            "piece": PIECE,
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "clear_pages_zero": self.clear_pages_zero,
            "offset": self.offset,
            "bitmap_order": self.bitmap_order,
            "blocks": [
                {
                    "name": block.name,
                    "length": block.length,
                    "page_size": block.page_size,
                    "header": block.header_offset,
                    "bitmap": block.bitmap_offset,
                    "pages": block.pages_offset,
                }
                for block in self.blocks
            ],
        }
        front = json.dumps(head).encode("ascii")[:-1]
        line = front + _end(digest_of_all(self.algorithm, [digests, front]))
        return line if len(line) <= HEAD_MAX else replace(self, blocks=()).encode(digests)


@dataclass(frozen=True)
class SealLine:
    """A decoded head; ``front`` is the part of its bytes that its digest covers."""

    head: SealHead
    digest: bytes
    front: bytes

    @classmethod
    def decode(cls, line: bytes) -> SealLine:
        """Decode the line, with its newline. Raises SnapshotError if it is malformed.

        :meth:`check` compares the digest.
        """
        if not line.endswith(b"\n") or len(line) > HEAD_MAX:
            raise _fault("the head of the seal does not end")
        try:
            head = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _fault("the head of the seal is not JSON") from error
        if not isinstance(head, dict) or head.get("format") != _FORMAT:
            raise _fault("this is not a seal")
        for key, only in (("version", _VERSION), ("piece", PIECE)):
            if _number(head, key) != only:
                raise _fault(f"{key} {head[key]} of the seal is not known here, only {only}")
        try:
            algorithm = Algorithm(head["algorithm"])
            digest = bytes.fromhex(head["digest"])
        except (KeyError, ValueError, TypeError) as error:
            raise _fault("the seal names no algorithm known here, or has no digest") from error
        size = _number(head, "size")
        if size > SEALED_MAX:
            raise _fault(f"the seal is of a file of {size} bytes; {SEALED_MAX} are possible")
        clear = head.get("clear_pages_zero")
        if not isinstance(clear, bool):
            raise _fault("clear_pages_zero of the seal is neither true nor false")
        order = head.get("bitmap_order", "little")
        if order not in ("little", "big"):
            raise _fault("bitmap_order of the seal is neither little nor big")
        blocks = head.get("blocks")
        if not isinstance(blocks, list):
            raise _fault("the seal has no list of blocks")
        if not line.endswith(_end(digest)):
            raise _fault("the seal does not end with its digest")
        offset, layouts = _number(head, "offset"), tuple(map(_block, blocks))
        _check_places(layouts, offset)
        return cls(
            SealHead(
                algorithm,
                size,
                _number(head, "mtime_ns", negative=True),
                clear,
                offset,
                layouts,
                order,
            ),
            digest,
            line[: -len(_end(digest))],
        )

    def check(self, digests: Iterable[Data]) -> None:
        """Check the digests and the head against the digest in the head.

        Raises SnapshotError if they differ, NotSupported if the library for the algorithm is missing.
        """
        if digest_of_all(self.head.algorithm, chain(digests, [self.front])) != self.digest:
            raise _fault("the seal itself is damaged: it is not what its digest was made of")


def _end(digest: bytes) -> bytes:
    return b', "digest": "' + digest.hex().encode("ascii") + b'"}\n'


def _block(value: Any) -> BlockLayout:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise _fault("the seal lists a block without a name")
    block = BlockLayout(
        value["name"],
        _number(value, "length"),
        _number(value, "page_size"),
        _number(value, "header"),
        _number(value, "bitmap"),
        _number(value, "pages"),
    )
    if block.page_size not in PAGE_SIZES:
        raise _fault(f"the seal lists a block with pages of {block.page_size} bytes")
    return block


def _check_places(blocks: tuple[BlockLayout, ...], offset: int) -> None:
    """Check that blocks are in the file's order and that their bitmaps do not overlap: so each offset
    belongs to few of them, however many are listed."""
    for block in blocks:
        if block.header_offset < offset or (
            not block.external and block.pages_offset < block.header_end
        ):
            raise _fault(f"the seal lists block {block.name!r} out of the file's order")
        offset = block.pages_end
    for (_, end, _), (start, _, _) in pairwise(bitmap_places(blocks)):
        if start < end:
            raise _fault("the seal lists blocks whose bitmaps overlap")


def bitmap_places(blocks: Sequence[BlockLayout]) -> list[tuple[int, int, int]]:
    """Return the places of the bitmaps, ``[start, end)``, and the number of the block; in order."""
    return sorted(
        (block.bitmap_offset, block.bitmap_offset + (block.num_pages + 7) // 8, number)
        for number, block in enumerate(blocks)
        if not block.external
    )


def _number(head: dict[str, Any], key: str, *, negative: bool = False) -> int:
    value = head.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _fault(f"{key} of the seal is not a whole number")
    if not (-OFFSET_MAX if negative else 0) <= value <= OFFSET_MAX:
        raise _fault(f"{key} of the seal is out of its range")
    return value


def _fault(message: str) -> SnapshotError:
    return SnapshotError(message, field="seal")
