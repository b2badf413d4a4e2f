"""Comparison of pages with their digests in a footer."""

from __future__ import annotations

from typing import Any

from pyqmigrate.errors import NotSupported
from pyqmigrate.format.digest import DIGEST_SIZE, Data
from pyqmigrate.format.store.config import PAGE

__all__ = ["first_other_page"]


def first_other_page(key: bytes, pages: Data, digests: Data) -> int | None:
    """Return the number of the first page whose keyed digest is not the one in ``digests``; None if
    all are. ``pages`` is whole pages of 4096 bytes, ``digests`` 16 bytes for each."""
    blake3: Any
    try:
        from blake3 import blake3
    except ImportError:
        raise NotSupported(
            "a store needs the package blake3: pip install 'pyqmigrate[store]'"
        ) from None
    view = memoryview(pages)
    found = b"".join(
        blake3(view[start : start + PAGE], key=key).digest(length=DIGEST_SIZE)
        for start in range(0, len(view), PAGE)
    )
    if found == digests:
        return None
    return next(
        number
        for number in range(len(view) // PAGE)
        if found[number * DIGEST_SIZE :][:DIGEST_SIZE]
        != digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]
    )
