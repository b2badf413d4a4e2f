"""Where the working set of a shown snapshot is kept: in its store, or beside a compact file."""

from __future__ import annotations

import errno
import os

from pyqmigrate.errors import TargetError
from pyqmigrate.format.store.keys import working_set_key
from pyqmigrate.io.own_files import write_whole
from pyqmigrate.io.working_set_file import (
    WORKING_SET_FILE,
    check_working_set_place,
    working_set_path,
)

__all__ = ["check_recordable", "write_working_set"]


def check_recordable(place: str, name: str | None) -> str:
    """Return where the working set of a snapshot would be written: ``name`` in the store ``place``, or
    None for the compact file ``place``.

    Raises UsageError if another file would be replaced, TargetError if the place cannot be written.
    """
    if name is None:
        return os.fspath(check_working_set_place(place))
    from pyqmigrate.store.store import Store

    with Store.open(place) as store:
        directory = store.place.directory
        if directory is not None and not os.access(directory, os.W_OK | os.X_OK):
            raise TargetError(
                errno.EACCES, "this user cannot write a working set into the store", store.name
            )
        return f"{store.name}/{working_set_key(name)}"


def write_working_set(place: str, name: str | None, content: bytes) -> None:
    """Write it; an older one is replaced. Arguments and errors as for :func:`check_recordable`."""
    if name is None:
        write_whole(working_set_path(place), WORKING_SET_FILE, lambda file: file.write(content))
        return
    from pyqmigrate.store.store import Store

    with Store.open(place) as store:
        store.write_working_set(name, content)
