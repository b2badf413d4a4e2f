"""Find what a damaged part of a sequential stream contained: which pages of the guest.

Pages have no fixed places there, and a seal does not record their places. The records do, as long as
they parse: they do if only page data was damaged. The records are read as they are now; one whose
own flags were damaged may name another page than before.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyqmigrate.integrity.damage import Part
from pyqmigrate.io.block_index import BlockIndex
from pyqmigrate.snapshot.sequential import SequentialSnapshot

__all__ = ["parts_of_stream"]

_PARTS_MAX = 64  # of one block in one stretch; the last takes in all that is left


def parts_of_stream(snapshot: SequentialSnapshot, start: int, end: int) -> Iterator[Part]:
    """Yield what is at file positions ``[start, end)``. Raises the errors of the pass over the
    stream."""
    index = snapshot.page_index()
    first, last = min(index.bodies, default=0), max(index.bodies.values(), default=0)
    found = False
    if start < snapshot.offset:
        yield Part("what is before the stream")
    if start < first and end > snapshot.offset:
        yield Part("head of the stream")
    for name, block in index.of.items():
        for part in _pages(name, block, start, end):
            found = True
            yield part
    if not found and start < last and first < end:
        yield Part("records of the stream, of pages that are zero or come again later")
    if end > last:
        yield Part("what follows RAM: the device state")


def _pages(name: str, index: BlockIndex, start: int, end: int) -> Iterator[Part]:
    """Yield the runs of pages that are made of these bytes; pages without data do not end a run."""
    npages, count = index.npages, 0
    page = index.next_from(0, start, end)
    while page < npages:
        count += 1
        first, held, stop = page, 0, page
        while page < npages and (
            count == _PARTS_MAX or page == stop or index.run(stop, page) == (page, False)
        ):
            held, stop = held + 1, page + 1
            page = index.next_from(stop, start, end)
        yield Part("pages", name, first, stop, held)
