"""Keep files that are not a store's out of its directory, where gc could remove them, or they could replace
what all snapshots need."""

from __future__ import annotations

import os
from pathlib import Path

from pyqmigrate.errors import UsageError
from pyqmigrate.format.store.keys import CONFIG_KEY

__all__ = ["refuse_in_store"]

_HEAD = 4096  # bytes of store.json


def refuse_in_store(path: str | os.PathLike[str], what: str) -> None:
    """Raise UsageError if ``path``, which need not exist, is below the directory of a store.

    ``what`` says what it would be, for the message. Links are resolved. A directory that cannot be looked
    into is not a store.
    """
    real = os.path.realpath(path)
    for directory in Path(real).parents:
        if _is_store(directory):
            raise UsageError(
                f"{os.fspath(path)!r} is in the store {str(directory)!r}: {what} must be elsewhere"
            )


def _is_store(directory: Path) -> bool:
    try:
        fd = os.open(directory / CONFIG_KEY, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    from pyqmigrate.format.store.config import (
        is_config,  # of few targets, and it costs a restore time
    )

    try:
        return is_config(os.pread(fd, _HEAD, 0))
    except OSError:
        return False
    finally:
        os.close(fd)
