"""Names of stored snapshots, and the keys of a store's objects.

A key is the path of a file in a local store, and the name of an object behind the prefix of a remote
one. Keys that are read from a listing are checked as names are: nothing leads out of the store.
"""

from __future__ import annotations

import re

from pyqmigrate.errors import UsageError

__all__ = [
    "CONFIG_KEY",
    "LOCKS",
    "NAME_MAX",
    "PACKS",
    "SNAPSHOTS",
    "WORKING_SETS",
    "check_name",
    "is_name",
    "name_of_snapshot",
    "pack_key",
    "pack_of_key",
    "snapshot_key",
    "working_set_key",
]

CONFIG_KEY = "store.json"
PACKS = "packs/"
SNAPSHOTS = "snapshots/"
WORKING_SETS = "working-sets/"
LOCKS = "locks/"
NAME_MAX = 200  # bytes: with a suffix it is a file name everywhere

_PACK = re.compile(r"packs/([0-9a-f]{32})\.pack")
_SNAPSHOT = re.compile(r"snapshots/(.+)\.snap", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_+@-][A-Za-z0-9._+@:-]*")
# Files that a mount shows beside a snapshot of that name.
_SUFFIXES = (".seal", ".vm.json", ".workingset", ".pages")


def is_name(name: str) -> bool:
    """Return whether a stored snapshot can have this name."""
    return (
        len(name) <= NAME_MAX and _NAME.fullmatch(name) is not None and not name.endswith(_SUFFIXES)
    )


def check_name(name: str) -> str:
    """Return ``name``. Raises UsageError unless a stored snapshot can have it."""
    if not is_name(name):
        raise UsageError(
            f"{name!r} cannot be the name of a stored snapshot: 1 to {NAME_MAX} letters (a to z), "
            "digits and . _ - + @ : are possible, no dot or colon at the start, and no end like "
            f"{', '.join(_SUFFIXES)}"
        )
    return name


def snapshot_key(name: str) -> str:
    """Return the key of a snapshot. Raises UsageError for an invalid name."""
    return f"{SNAPSHOTS}{check_name(name)}.snap"


def name_of_snapshot(key: str) -> str | None:
    """Return the name of the snapshot whose key this is, None for any other key."""
    match = _SNAPSHOT.fullmatch(key)
    return match[1] if match and is_name(match[1]) else None


def working_set_key(name: str) -> str:
    """Return the key of a snapshot's working set. Raises UsageError for an invalid name."""
    return f"{WORKING_SETS}{check_name(name)}.ws"


def pack_key(digest: bytes) -> str:
    """Return the key of the pack with this digest of 16 bytes."""
    return f"{PACKS}{digest.hex()}.pack"


def pack_of_key(key: str) -> bytes | None:
    """Return the digest of the pack whose key this is, None for any other key."""
    match = _PACK.fullmatch(key)
    return bytes.fromhex(match[1]) if match else None
