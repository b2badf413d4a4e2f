"""Digests of 16 bytes, and the libraries that compute them.

``xxh3-128`` detects damage, at the speed of memory; it does not detect deliberate changes.
``blake3`` and ``sha256`` do, with 128 bits: both are truncated to 16 bytes.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from pyqmigrate.errors import NotSupported

__all__ = ["DIGEST_SIZE", "Algorithm", "Data", "digest_of_all", "digester", "zero_digest"]

DIGEST_SIZE = 16  # bytes

Data: TypeAlias = bytes | bytearray | memoryview


class Algorithm(enum.StrEnum):
    """How a digest is computed."""

    XXH3_128 = "xxh3-128"
    BLAKE3 = "blake3"
    SHA256 = "sha256"


def digester(algorithm: Algorithm) -> Callable[[Data], bytes]:
    """Return the function from bytes to their digest; it releases the GIL for long input.

    Raises NotSupported if the library for it is not installed.
    """
    if algorithm is Algorithm.XXH3_128:
        import xxhash  # imported when first used, as all of them: most verbs make no digest

        return xxhash.xxh3_128_digest
    if algorithm is Algorithm.SHA256:
        import hashlib

        return lambda data: hashlib.sha256(data).digest()[:DIGEST_SIZE]
    blake3 = _blake3()

    def digest(data: Data) -> bytes:
        found: bytes = blake3(data).digest(length=DIGEST_SIZE)
        return found

    return digest


def digest_of_all(algorithm: Algorithm, pieces: Iterable[Data]) -> bytes:
    """Return the digest of the concatenated ``pieces``."""
    if algorithm is Algorithm.BLAKE3:
        blake3 = _feed(_blake3()(), pieces)
        found: bytes = blake3.digest(length=DIGEST_SIZE)
        return found
    state: Any
    if algorithm is Algorithm.XXH3_128:
        import xxhash

        state = xxhash.xxh3_128()
    else:
        import hashlib

        state = hashlib.sha256()
    return bytes(_feed(state, pieces).digest()[:DIGEST_SIZE])


@functools.lru_cache(maxsize=16)
def zero_digest(algorithm: Algorithm, length: int) -> bytes:
    """Return the digest of ``length`` zero bytes."""
    return digester(algorithm)(bytes(length))


def _feed(state: Any, pieces: Iterable[Data]) -> Any:
    for piece in pieces:
        state.update(piece)
    return state


def _blake3() -> Any:
    try:
        from blake3 import blake3
    except ImportError:
        raise NotSupported(
            "blake3 is not installed: pip install blake3, or choose xxh3-128 or sha256"
        ) from None
    return blake3
