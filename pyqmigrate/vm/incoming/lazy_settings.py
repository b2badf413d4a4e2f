"""How the page server of a lazy restore shall work, from the options and what is beside the snapshot."""

from __future__ import annotations

import os

from pyqmigrate.errors import UsageError
from pyqmigrate.io.own_files import check_replaceable
from pyqmigrate.io.working_set_file import (
    IN_STORE,
    WORKING_SET_FILE,
    read_current_working_set,
    working_set_path,
)
from pyqmigrate.vm.incoming.lazy_keeper import ServerSettings
from pyqmigrate.vm.incoming.options import Push, RestoreOptions
from pyqmigrate.vm.incoming.source import RestoreSource

__all__ = ["server_settings"]


def server_settings(
    options: RestoreOptions, source: RestoreSource
) -> tuple[ServerSettings, list[str]]:
    """Return the settings, and notes. Raises UsageError, TargetError."""
    given = options.working_set
    record = working_set = None
    notes: list[str] = []
    if options.record is not None:
        if options.push is Push.NEVER:
            raise UsageError(
                "a working set is written when the guest has all of its memory, which push never "
                "does not send: use idle"
            )
        record = os.fspath(given) if given is not None else _record_beside(source)
    else:
        working_set = os.fspath(given) if given is not None else _recorded(source, notes)
    settings = ServerSettings(
        push=options.push,
        working_set=working_set,
        record=record,
        record_seconds=options.record,
        base=None if options.base is None else os.path.abspath(options.base),
        cache=None if options.cache is None else os.fspath(options.cache),
        offset=options.offset,
    )
    if given is not None and record is not None:
        check_replaceable(given, WORKING_SET_FILE)
    return settings, notes


def _record_beside(source: RestoreSource) -> str:
    """Return where the working set of a snapshot is written without ``--working-set``."""
    if source.view is not None:
        place = source.view.view.check_recordable()
        return IN_STORE if source.view.stored else place
    if source.place is None:
        raise UsageError("a working set is recorded beside a snapshot that is given by its path")
    path = working_set_path(source.place)
    check_replaceable(path, WORKING_SET_FILE)
    return os.fspath(path)


def _recorded(source: RestoreSource, notes: list[str]) -> str | None:
    """Return the working set beside the snapshot, or in its store, if there is one that can be used."""
    if source.place is None:
        return None
    stored = source.view is not None and source.view.stored
    # A server reads that of a compact file beside it, and has its own view of it.
    path = working_set_path(source.place if stored else source.server_target or source.place)
    if not os.path.lexists(path):
        return None
    try:
        read_current_working_set(path, source.identify())
    except (OSError, ValueError) as error:
        notes.append(f"the recorded working set is not used: {error}")
        return None
    return IN_STORE if stored else os.fspath(path)
