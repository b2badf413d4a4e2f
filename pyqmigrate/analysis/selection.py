"""Which pages of two snapshots have to be compared: all, unless others are known to be equal.

A snapshot is its whole file, or an increment and the base. What the whole files have in common is known
if they are one file, or by their seals: a MiB with equal digests has equal pages. Beside the rest, only
the pages of the increments have to be looked at.

A seal is used if its file was not modified since, and if clear pages are zeros in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.seal import PIECE
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.integrity.manifest import Manifest
from pyqmigrate.integrity.verify import current_seal
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.increment import IncrementSnapshot
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot

__all__ = ["Selector"]

_COMPARED_AT_ONCE = 4096  # digests


class Selector:
    """Selects the pages to compare of two open snapshots. ``seals`` says whether seals may be used.

    ``by_seals`` says whether they are.
    """

    def __init__(self, a: Snapshot, b: Snapshot, *, seals: bool) -> None:
        self._snapshots = a, b
        self._same_file = False
        self._manifests: tuple[Manifest, Manifest] | None = None
        roots = _whole_file(a), _whole_file(b)
        if roots[0] is None or roots[1] is None:
            return
        self._same_file = roots[0].identity == roots[1].identity
        if seals and not self._same_file:
            found = _usable_seal(roots[0]), _usable_seal(roots[1])
            if found[0] and found[1] and found[0].algorithm is found[1].algorithm:
                self._manifests = found[0], found[1]

    @property
    def by_seals(self) -> bool:
        return self._manifests is not None

    def pages(self, name: str) -> Bitmap | None:
        """Return a new bitmap of the pages of a block that have to be compared, None for all of them.

        Both snapshots have the block. Close the bitmap.
        """
        if not self._same_file and self._manifests is None:
            return None
        blocks = [snapshot.blocks[name] for snapshot in self._snapshots]
        layouts = [_layout_of_whole(snapshot, name) for snapshot in self._snapshots]
        a, b = layouts
        if (a.length, a.page_size) != (b.length, b.page_size):
            return None
        if not self._same_file and (a.pages_offset % PIECE or b.pages_offset % PIECE):
            return None
        selected = Bitmap(blocks[0].num_pages)
        try:
            if self._manifests is not None:
                for first, end in _differing(*self._manifests, a, b):
                    selected.add_range(first, end)
            for snapshot in self._snapshots:
                if isinstance(snapshot, IncrementSnapshot):
                    selected.add(snapshot.blocks[name].bitmap)
        except BaseException:
            selected.close()
            raise
        return selected


def _whole_file(snapshot: Snapshot) -> MappedRamSnapshot | None:
    if isinstance(snapshot, IncrementSnapshot):
        return snapshot.base
    return snapshot if isinstance(snapshot, MappedRamSnapshot) else None


def _layout_of_whole(snapshot: Snapshot, name: str) -> BlockLayout:
    root = _whole_file(snapshot)
    assert root is not None
    return root.blocks[name].layout


def _usable_seal(snapshot: MappedRamSnapshot) -> Manifest | None:
    source = snapshot.source
    if source.place is None:
        return None
    manifest = current_seal(source.place, source.fd)
    return manifest if manifest is not None and manifest.clear_pages_zero else None


def _differing(
    a: Manifest, b: Manifest, of_a: BlockLayout, of_b: BlockLayout
) -> Iterator[tuple[int, int]]:
    """Yield the pages ``[first, end)`` of the pieces of a block whose digests are not equal.

    The pages start with a piece in both files. A file may end before the pages of a block do: what
    is past the end of both are zeros.
    """
    pages = PIECE // of_a.page_size
    digests = _digests(a, of_a), _digests(b, of_b)
    total = min(-(-of_a.num_pages // pages), max(map(len, digests)) // DIGEST_SIZE)
    for first in range(0, total, _COMPARED_AT_ONCE):
        end = min(first + _COMPARED_AT_ONCE, total)
        left, right = (part[first * DIGEST_SIZE : end * DIGEST_SIZE] for part in digests)
        if left == right:
            continue
        for piece in range(first, end):
            start = (piece - first) * DIGEST_SIZE
            if left[start : start + DIGEST_SIZE] != right[start : start + DIGEST_SIZE]:
                yield piece * pages, min((piece + 1) * pages, of_a.num_pages)


def _digests(manifest: Manifest, layout: BlockLayout) -> memoryview:
    """Return the digests from the first piece of a block on."""
    return memoryview(manifest.digests)[layout.pages_offset // PIECE * DIGEST_SIZE :]
