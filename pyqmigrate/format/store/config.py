"""``store.json``: what all files of a store have in common.

One JSON object, at most 64 KiB; readers step over keys that they do not know::

    format       "pyqmigrate-store"
    version      1
    page         4096, bytes
    digest       "blake3": keyed, the first 16 bytes
    key          64 hexadecimal digits: the store's own random key
    frame_pages  64: pages in a frame, at most
    zstd_level   1
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.store.keyed import KEY_SIZE

__all__ = ["CONFIG_MAX", "FRAME_PAGES_MAX", "PAGE", "StoreConfig", "is_config"]

PAGE = 4096  # bytes: the unit of deduplication
FRAME_PAGES_MAX = 64
CONFIG_MAX = 1 << 16  # bytes

_FORMAT = "pyqmigrate-store"
_VERSION = 1
_LEVELS = range(1, 20)


def is_config(data: bytes) -> bool:
    """Return whether a file that starts with ``data`` is, or was, the configuration of a store."""
    return b'"' + _FORMAT.encode() + b'"' in data


@dataclass(frozen=True)
class StoreConfig:
    """The configuration of a store. The key is left out of its ``repr``."""

    key: bytes = field(repr=False)
    frame_pages: int = FRAME_PAGES_MAX
    zstd_level: int = 1

    @classmethod
    def new(cls) -> StoreConfig:
        """Return the configuration of a new store, with a random key."""
        return cls(secrets.token_bytes(KEY_SIZE))

    def encode(self) -> bytes:
        """Return the content of ``store.json``."""
        value = {
            "format": _FORMAT,
            "version": _VERSION,
            "page": PAGE,
            "digest": "blake3",
            "key": self.key.hex(),
            "frame_pages": self.frame_pages,
            "zstd_level": self.zstd_level,
        }
        return json.dumps(value, indent=2).encode("ascii") + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> StoreConfig:
        """Read ``store.json``.

        Raises SnapshotError if it is malformed, NotSupported for a store of another version, page
        size or digest. Messages do not contain the key.
        """
        if len(data) > CONFIG_MAX:
            raise _fault(f"it has more than {CONFIG_MAX} bytes")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise _fault("it is not JSON") from None
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise _fault("this is not a store")
        for key, known in (("version", _VERSION), ("page", PAGE), ("digest", "blake3")):
            found = value.get(key)
            if type(found) is not type(known) or found != known:
                raise NotSupported(f"store.json: {key} is {found!r:.80}; only {known!r} is known")
        frame_pages, level = value.get("frame_pages"), value.get("zstd_level")
        if type(frame_pages) is not int or not 1 <= frame_pages <= FRAME_PAGES_MAX:
            raise _fault(f"frame_pages is not a number from 1 to {FRAME_PAGES_MAX}")
        if type(level) is not int or level not in _LEVELS:
            raise _fault(f"zstd_level is not a number from 1 to {_LEVELS[-1]}")
        key_text = value.get("key")
        try:
            secret = bytes.fromhex(key_text) if isinstance(key_text, str) else b""
        except ValueError:
            secret = b""
        if len(secret) != KEY_SIZE:
            raise _fault(f"key is not {2 * KEY_SIZE} hexadecimal digits")
        return cls(secret, frame_pages, level)


def _fault(message: str) -> SnapshotError:
    return SnapshotError(f"{message}", field="store.json")
