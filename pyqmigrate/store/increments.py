"""Add an increment without a copy of its memory: its outline, and which pieces are those of the parent.

The pages are read from the increment and its base. Where the base is sealed and the parent's seal has
the same piece of 1 MiB, and the increment changes no page of it, the piece is the parent's and not
read. The result is that of adding the file which ``convert`` makes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pyqmigrate.errors import NotSupported, SnapshotError, TargetError
from pyqmigrate.export.outline import DecidedPages, Outline
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.seal import PIECE, SealHead, count_pieces
from pyqmigrate.format.store.config import PAGE
from pyqmigrate.format.store.snapshot import StoredSnapshot
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.integrity.manifest import Manifest, read_manifest
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.place import seal_path
from pyqmigrate.io.target import Descriptors
from pyqmigrate.log import logger
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.increment import IncrementBlock, IncrementSnapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.store.parents import Guest, Parent

__all__ = ["current_seal", "has_outline", "write_outline"]


def has_outline(snapshot: Snapshot) -> bool:
    """Return whether a snapshot is an increment that can be added by its outline."""
    return isinstance(snapshot, IncrementSnapshot) and all(
        block.page_size % PAGE == 0 for block in snapshot.blocks.values()
    )


def current_seal(snapshot: MappedRamSnapshot, info: os.stat_result) -> Manifest | None:
    """Return the seal beside a file if it is current and of what a store shows. One that is not is left
    alone; so is a damaged one. ``info`` is what the system said of the file."""
    place = snapshot.source.place
    if place is None:
        return None

    def fits(head: SealHead) -> bool:
        current = (head.size, head.mtime_ns) == (info.st_size, info.st_mtime_ns)
        return current and head.clear_pages_zero

    try:
        return read_manifest(seal_path(place), count_pieces(info.st_size) * 16, wanted=fits)
    except (SnapshotError, NotSupported, TargetError) as error:
        logger.warning("the seal of %s is not used: %s", place, error)
        return None


def write_outline(increment: IncrementSnapshot, fd: int, parent: Parent | None) -> bytes | None:
    """Write the outline of an increment into the empty file ``fd``; return, for each piece of that
    file, whether it is the parent's, or None if no piece is.

    Raises the errors of ``convert``.
    """
    same = None if parent is None else _same_in_base(increment, parent)
    outline = Outline(increment, Descriptors(fd))
    known: list[DecidedPages] = []
    try:
        blocks = list(increment.blocks.values())
        pieces = bytearray(count_pieces(max(layout.pages_end for layout in outline.layouts)))
        for block, layout in zip(blocks, outline.layouts, strict=True):
            if same is not None and layout.pages_offset == block.base.pages_offset:
                _keep_unchanged(pieces, same, block)
        for layout in outline.layouts:
            known.append(_decided(layout, pieces, None if parent is None else parent.snapshot))
        outline.write(known)
    finally:
        outline.close()
        for pages in known:
            pages.close()
    if not any(pieces):
        return None
    return bytes(pieces).ljust(count_pieces(os.fstat(fd).st_size), b"\0")


def _same_in_base(increment: IncrementSnapshot, parent: Parent) -> bytes | None:
    """Return, for each piece of the base, whether the parent shows the same bytes."""
    base = increment.base
    info = os.fstat(base.source.file_fd)
    manifest = current_seal(base, info)
    # The digests become those of the seal of what is added, which has this algorithm.
    if manifest is None or manifest.algorithm is not Algorithm.XXH3_128:
        return None
    blocks = parent.snapshot.head.blocks
    guest = Guest(
        increment.stream.uuid,
        increment.machine,
        blocks,
        info.st_size,
        manifest.algorithm,
        bytes(manifest.digests),
    )
    return parent.same_pieces(guest)


def _keep_unchanged(pieces: bytearray, same: bytes, block: IncrementBlock) -> None:
    """Set the pieces inside the block's pages that are ``same`` in the base and have no changed page."""
    start, end = block.base.pages_offset, block.base.pages_offset + block.length
    for piece in range(-(-start // PIECE), end // PIECE):
        if piece >= len(same) or not same[piece]:
            continue
        first = (piece * PIECE - start) // block.page_size
        stop = -(-((piece + 1) * PIECE - start) // block.page_size)
        if not block.bitmap[first] and block.bitmap.run_end(first, stop) == stop:
            pieces[piece] = 1


def _decided(layout: BlockLayout, pieces: bytearray, parent: StoredSnapshot | None) -> DecidedPages:
    """Return the pages of the parent's pieces, and which of them are not zero by its index."""
    size, npages = layout.page_size, layout.num_pages
    pages = DecidedPages(Bitmap(npages), Bitmap(npages))
    try:
        start, end = layout.pages_offset, layout.pages_offset + layout.length
        ranges = [
            ((first * PIECE - start) // size, (stop * PIECE - start) // size)
            for first, stop in _runs_of_ones(pieces, -(-start // PIECE), end // PIECE)
        ]
        for first, stop in ranges:
            pages.decided.add_range(first, stop)
        if parent is None or not ranges:
            return pages
        for runs in (parent.runs, parent.fills):
            for page, count in zip(runs.firsts, runs.counts, strict=True):
                low, high = max(page * PAGE, start), min((page + count) * PAGE, end)
                if low < high:
                    pages.data.add_range((low - start) // size, -(-(high - start) // size))
        outside = Bitmap(npages)
        try:
            outside.add_all()
            outside.remove(pages.decided)
            pages.data.remove(outside)
        finally:
            outside.close()
    except BaseException:
        pages.close()
        raise
    return pages


def _runs_of_ones(pieces: bytearray, first: int, end: int) -> Sequence[tuple[int, int]]:
    found = []
    while (first := pieces.find(1, first, end)) >= 0:
        stop = pieces.find(0, first, end)
        stop = end if stop < 0 else stop
        found.append((first, stop))
        first = stop
    return found
