"""What the mounts of this package do: asked from their keepers."""

from __future__ import annotations

import contextlib
from typing import Any

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.mount.asking import connect
from pyqmigrate.mount.mounting import Mounted, find_mounts
from pyqmigrate.mount.unmounting import place_of

__all__ = ["mount_status"]


def mount_status(directory: str | None = None) -> list[dict[str, Any]]:
    """Return the status of each mount, or of the one on ``directory``: the objects of ``mounts`` in
    docs/json.md.

    If a keeper does not answer, ``keeper`` is None, and only ``directory`` and ``place`` are there with it.
    Raises UsageError if nothing of this package is mounted on ``directory``.
    """
    mounts = find_mounts(None if directory is None else place_of(directory))
    if directory is not None and not mounts:
        raise UsageError(f"{directory!r} is not a mount of pyqmigrate")
    return [_status_of(mounted) for mounted in mounts]


def _status_of(mounted: Mounted) -> dict[str, Any]:
    client = connect(mounted.device, mounted.uid)
    if client is not None:
        try:
            with contextlib.suppress(PyqmigrateError):
                return client.ask("status")
        finally:
            client.close()
    return {"directory": mounted.directory, "place": mounted.source, "keeper": None}
