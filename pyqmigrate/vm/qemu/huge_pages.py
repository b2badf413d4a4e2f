"""Keep huge pages of the page cache out of the memory of a QEMU whose touched pages are recorded.

The kernel maps a huge page of the cache as a whole at the first touch: its 512 pages would all seem
touched. The setting is that of a process, which its children inherit, through an exec too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["without_huge_pages"]

_PR_SET_THP_DISABLE = 41
_PR_GET_THP_DISABLE = 42


@contextlib.contextmanager
def without_huge_pages() -> Iterator[None]:
    """Have processes that are started inside use no huge pages, if the kernel can do that."""
    import ctypes  # only a recording needs it

    prctl = ctypes.CDLL(None).prctl
    before = prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0)
    changed = before == 0 and prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        if changed:
            prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)
