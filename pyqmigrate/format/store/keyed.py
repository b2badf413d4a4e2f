"""BLAKE3 keyed with the store's key, shortened to 16 bytes: what identifies pages, packs and documents.

16 bytes suffice: a guest does not know the key, so it cannot search for two pages of one digest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyqmigrate.errors import NotSupported
from pyqmigrate.format.digest import DIGEST_SIZE, Data

__all__ = ["KEY_SIZE", "keyed_digest"]

KEY_SIZE = 32  # bytes


def keyed_digest(key: bytes, pieces: Iterable[Data]) -> bytes:
    """Return the digest of the concatenated ``pieces``. Raises NotSupported without the library."""
    try:
        from blake3 import blake3
    except ImportError:
        raise NotSupported("a store needs the package blake3: pip install blake3") from None
    state: Any = blake3(key=key)
    for piece in pieces:
        state.update(piece)
    digest: bytes = state.digest(length=DIGEST_SIZE)
    return digest
