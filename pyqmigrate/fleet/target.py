"""What a fleet run works on: one snapshot, wherever it is, and how it is recognised again."""

from __future__ import annotations

import enum
import os
from collections.abc import Container
from dataclasses import asdict, dataclass
from typing import Any

from pyqmigrate.format.page_table import SUFFIX as PAGE_TABLE_SUFFIX
from pyqmigrate.format.seal import SUFFIX as SEAL_SUFFIX
from pyqmigrate.format.working_set import SUFFIX as WORKING_SET_SUFFIX

__all__ = [
    "COMPANION_SUFFIXES",
    "Kind",
    "Target",
    "companion_of",
    "file_identity",
    "file_identity_of",
]

COMPANION_SUFFIXES = (SEAL_SUFFIX, ".vm.json", WORKING_SET_SUFFIX, PAGE_TABLE_SUFFIX)


class Kind(enum.StrEnum):
    """Where a snapshot is: a file of this machine, an object, or a store."""

    FILE = "file"
    OBJECT = "object"
    STORED = "stored"


@dataclass(frozen=True)
class Target:
    """One snapshot.

    ``name`` is what results are filed under: the absolute path of a file, ``PLACE/KEY`` of an
    object, ``STORE#NAME`` of a stored snapshot. ``place`` is the path of the file, or what opens
    the place of the object or store (without credentials); ``key`` is the key or the stored name.
    ``size`` in bytes. ``below`` is its path below the directory or prefix that was listed, the last
    part of its name if it was named itself. ``identity`` changes when the content does. ``sealed``: there is a seal
    beside it. ``named``: the user named it itself, so it is a snapshot, whatever its content looks
    like.
    """

    name: str
    kind: Kind
    place: str
    key: str
    size: int
    below: str
    identity: str
    sealed: bool = False
    named: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return values for JSON, which :meth:`from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Target:
        return cls(**{**values, "kind": Kind(values["kind"])})


def file_identity(path: str | os.PathLike[str]) -> str:
    """Return what identifies the content of a file, and the seal beside it. Raises OSError."""
    try:
        seal = os.stat(os.fspath(path) + SEAL_SUFFIX)
    except OSError:
        seal = None
    return file_identity_of(os.stat(path), seal)


def file_identity_of(info: os.stat_result, seal: os.stat_result | None) -> str:
    """Return :func:`file_identity` of a file and its seal (None: it has none)."""
    parts = [f"{info.st_size}:{info.st_mtime_ns}:{info.st_ino}"]
    if seal is not None:
        parts.append(f"{seal.st_size}:{seal.st_mtime_ns}:{seal.st_ino}")
    return "+".join(parts)


def companion_of(name: str, names: Container[str]) -> str | None:
    """Return the name of the snapshot that ``name`` is a companion of (a seal, a record), if that is
    one of ``names``; None otherwise."""
    for suffix in COMPANION_SUFFIXES:
        front = name.removesuffix(suffix)
        if front != name and front in names:
            return front
    return None
