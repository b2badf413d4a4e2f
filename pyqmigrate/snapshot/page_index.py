"""The index of a sequential stream: where in the file each page of each block is.

Pages have no fixed places in a sequential stream, so random reads need one pass over all of it. The
index needs 8 bytes for each page, and 24 for each XBZRLE change. It can be stored in a file beside the
stream, so that later opens need no pass.

A stored index is an untrusted cache. It is used only if its digest is right, if it was made for a file
with the same size, modification time, first and last bytes, and if every number in it is possible.
Otherwise the stream is read again. Its format, little-endian::

    "qmindex2"
    16 bytes: xxh3-128 of all that follows
    u32 length, JSON of that length, zeros up to a file offset that is a multiple of 8
    for each block, with the numbers of changes and runs from the JSON:
        changes   u64 before, u64 at, u64 length
        runs      u64 first page, u64 pages, a u64 word a page (csrc/qmigrate.h, qm_place)

The JSON has ``size``, ``mtime_ns``, ``offset``, ``page_size``, ``digest``, ``bodies`` (start and
end of each body of records) and ``blocks`` (name, length, changes, runs).
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.stream.sequential import ListedBlock
from pyqmigrate.io.block_index import BlockIndex
from pyqmigrate.io.channels import Channels
from pyqmigrate.io.input import Source
from pyqmigrate.io.own_files import FileKind, check_replaceable, write_whole
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.records import RecordDecoder

__all__ = ["PageIndex", "check_place", "keep", "recall"]

_MAGIC = b"qmindex2"
_OLDER = b"qmindex1"  # had no digest
_INDEX = FileKind("index", lambda head: head.startswith((_MAGIC, _OLDER)))
_BODY = len(_MAGIC) + DIGEST_SIZE  # offset of the digested part
_HEAD_MAX = 64 << 20
_PIECE = 1 << 20  # bytes read at a time
_RUN_MAX = 1 << 16  # pages in one run of a stored index
_DIGESTED = 64 << 10  # bytes at either end of the stream's file
_CHANGE = struct.Struct("<QQQ")
_RUN = struct.Struct("<QQ")


class PageIndex:
    """The places of the pages of ``blocks``; empty at first.

    ``of`` maps names of blocks to their indexes. ``bodies`` maps the start of each body of
    records to its end. :meth:`read_records` fills both, a body at a time.
    """

    def __init__(self, blocks: Sequence[ListedBlock], page_size: int) -> None:
        self.blocks = blocks
        self.page_size = page_size
        self.bodies: dict[int, int] = {}
        self.of = {block.name: BlockIndex(block.length // page_size, page_size) for block in blocks}
        self._records = RecordDecoder(blocks, page_size)
        for number, block in enumerate(blocks):
            self._records.write_to_index(number, self.of[block.name])
        self._records.start()

    def read_records(self, source: Source, channels: Channels, offset: int) -> int:
        """Read the body of records at ``offset``; return where it ends.

        Raises SnapshotError, NotSupported for records that an index cannot represent, TargetError,
        Cancelled.
        """
        end = self.bodies[offset] = self._records.read(source, channels, offset)
        return end


def check_place(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of an index. Raises UsageError if another file is there, for example
    the snapshot itself; an empty file is accepted. Raises TargetError."""
    return check_replaceable(path, _INDEX)


def keep(index: PageIndex, stream_file: StreamFile, path: Path) -> None:
    """Write the index to ``path``, which appears when it is complete. The name need not be durable: a
    lost index is made again.

    Raises UsageError if another file is there now, TargetError.
    """
    write_whole(path, _INDEX, lambda file: _write(index, stream_file, file), sync_name=False)


def _write(index: PageIndex, stream_file: StreamFile, file: BinaryIO) -> None:
    file.write(_MAGIC + bytes(DIGEST_SIZE))
    state = xxhash.xxh3_128()
    for piece in _pieces(index, stream_file):
        state.update(piece)
        file.write(piece)
    file.seek(len(_MAGIC))
    file.write(state.digest())


def _pieces(index: PageIndex, stream_file: StreamFile) -> Iterator[bytes]:
    """Yield the bytes after the digest."""
    lists = {block.name: list(_runs(index, block)) for block in index.blocks}
    head = json.dumps(
        {
            **_identity(stream_file),
            "page_size": index.page_size,
            "bodies": [*index.bodies.items()],
            "blocks": [
                [b.name, b.length, index.of[b.name].count_changes(), len(lists[b.name])]
                for b in index.blocks
            ],
        }
    ).encode()
    yield struct.pack("<I", len(head)) + head + _padding(head)
    for block in index.blocks:
        of_block = index.of[block.name]
        for change in of_block.changes():
            yield _CHANGE.pack(*change)
        for first, npages in lists[block.name]:
            yield _RUN.pack(first, npages) + _little_endian(of_block.words(first, npages))


def _padding(head: bytes) -> bytes:
    return bytes(-(_BODY + 4 + len(head)) % 8)


def _little_endian(words: bytes) -> bytes:
    """Convert native words to little-endian ones, or back."""
    if sys.byteorder == "little":
        return words
    swapped = array.array("Q", words)
    swapped.byteswap()
    return swapped.tobytes()


def _runs(index: PageIndex, block: ListedBlock) -> Iterator[tuple[int, int]]:
    """Yield ranges of pages, in multiples of 512, that contain all mentioned pages."""
    of_block, end = index.of[block.name], block.length // index.page_size
    start = stop = 0
    while (page := of_block.next(stop)) < end:
        first = page // 512 * 512
        if first != stop or stop - start >= _RUN_MAX:
            if stop > start:
                yield start, stop - start
            start = first
        stop = min(first + 512, end)
    if stop > start:
        yield start, stop - start


def _identity(stream_file: StreamFile) -> dict[str, Any]:
    source = stream_file.source
    info = os.fstat(source.fd)
    digest = hashlib.sha256(source.read_at(stream_file.offset, _DIGESTED))
    digest.update(source.read_at(max(0, info.st_size - _DIGESTED), _DIGESTED))
    return {
        "size": info.st_size,
        "mtime_ns": info.st_mtime_ns,
        "offset": stream_file.offset,
        "digest": digest.hexdigest(),
    }


def recall(
    stream_file: StreamFile, path: Path, blocks: Sequence[ListedBlock], page_size: int
) -> PageIndex | None:
    """Return the index that ``path`` stores; None if it is missing, belongs to another file, or is
    damaged. The blocks and page size are those of the stream's head."""
    try:
        with path.open("rb") as file:
            if not _is_whole(file):
                return None
            index = _read(stream_file, file, os.fstat(file.fileno()).st_size, blocks, page_size)
            return None if file.read(1) else index
    # The digest excludes damage, but the writer of the file can have digested anything.
    except (OSError, ValueError, TypeError, KeyError, OverflowError, struct.error, RecursionError):
        return None


def _is_whole(file: BinaryIO) -> bool:
    """Return whether the file is an index with the right digest; then its body is next."""
    if file.read(len(_MAGIC)) != _MAGIC:
        return False
    digest, state = file.read(DIGEST_SIZE), xxhash.xxh3_128()
    while piece := file.read(_PIECE):
        state.update(piece)
    file.seek(_BODY)
    return state.digest() == digest


def _take(file: BinaryIO, length: int) -> bytes:
    """Return exactly ``length`` bytes. Raises ValueError if there are fewer."""
    data = file.read(length)
    if len(data) != length:
        raise ValueError("cut off")
    return data


def _read(
    stream_file: StreamFile,
    file: BinaryIO,
    size: int,
    blocks: Sequence[ListedBlock],
    page_size: int,
) -> PageIndex:
    source = stream_file.source
    length = int.from_bytes(_take(file, 4), "little")
    if length > min(_HEAD_MAX, size):
        raise ValueError("too long")
    text = _take(file, length)
    head = json.loads(text)
    _take(file, len(_padding(text)))
    if any(head[key] != value for key, value in _identity(stream_file).items()):
        raise ValueError("another file")
    listed = [(name, length) for name, length, _, _ in head["blocks"]]
    if head["page_size"] != page_size or listed != [(b.name, b.length) for b in blocks]:
        raise ValueError("other blocks")
    index = PageIndex(blocks, page_size)
    for start, end in head["bodies"]:
        if not (type(start) is type(end) is int and 0 <= start < end <= source.size):
            raise ValueError("a body outside of the file")
        index.bodies[start] = end
    for block, (_, _, changes, runs) in zip(blocks, head["blocks"], strict=True):
        of_block, block_pages = index.of[block.name], block.length // page_size
        if not 0 <= changes * _CHANGE.size + runs * _RUN.size <= size:
            raise ValueError("too many")
        for _ in range(changes):
            before, position, length = _CHANGE.unpack(_take(file, _CHANGE.size))
            of_block.put_change(before, position, length, source.size)
        for _ in range(runs):
            first, npages = _RUN.unpack(_take(file, _RUN.size))
            # Only pieces of the form that is written: one page costs the core as much as 512.
            if npages * 8 > size or first % 512 or (npages % 512 and first + npages != block_pages):
                raise ValueError("no such run")
            of_block.put_words(first, _little_endian(_take(file, npages * 8)), source.size)
    return index
