"""The comparison of one block of two open snapshots, and the errors of reading them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from pyqmigrate.analysis.naming import naming
from pyqmigrate.analysis.selection import Selector
from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.io.page_comparison import PageComparison
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot, error_from_errno
from pyqmigrate.snapshot.detect import snapshot_of

__all__ = ["comparable", "compared_block", "opened", "unreadable"]


@contextlib.contextmanager
def opened(
    target: Snapshot | Target, page_size: int | None, base: str | os.PathLike[str] | None
) -> Iterator[Snapshot]:
    """Open ``target`` unless it is open; a snapshot that was given stays open.

    ``page_size`` and ``base`` as for ``open_snapshot``, except that ``base`` is not used for a whole
    snapshot.
    """
    if isinstance(target, Snapshot):
        yield target
        return
    stream_file = StreamFile.open(target)
    given = None if stream_file.increment is None else base
    with snapshot_of(stream_file, page_size=page_size, base=given) as snapshot:
        yield snapshot


def comparable(a: Snapshot, b: Snapshot, name: str) -> bool:
    """Return whether both contain the block."""
    return (
        name in a.blocks
        and name in b.blocks
        and not (a.blocks[name].external or b.blocks[name].external)
    )


def compared_block(a: Snapshot, b: Snapshot, name: str, selector: Selector) -> PageComparison:
    """Return the comparison of a block that both contain, of those pages that may differ. Close it.

    Raises NotSupported for different page sizes that do not fit, and the errors of bitmaps.
    """
    of_a, of_b = a.blocks[name], b.blocks[name]
    page_size, shorter = max(of_a.page_size, of_b.page_size), min(of_a.length, of_b.length)
    if shorter % page_size:
        raise NotSupported(
            f"block {name!r} has pages of {of_a.page_size} and of {of_b.page_size} bytes, and "
            f"{shorter} bytes are not whole pages of both"
        )
    selection = selector.pages(name)
    try:
        with naming(a):
            memory = of_a.memory()
        with naming(b):
            memories = memory, of_b.memory()
        return PageComparison(name, memories, shorter // page_size, page_size, selection)
    except BaseException:
        if selection is not None:
            selection.close()
        raise


def unreadable(number: int, snapshot: Snapshot, block: str) -> Exception:
    """Return the exception for pages that cannot be read: the errno, and the name of the block."""
    error = error_from_errno(number, snapshot.source, block)
    if isinstance(error, SnapshotError):
        error.add_note(f"{snapshot.source.name}: ")
    return error
