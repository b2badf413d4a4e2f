"""The working set of a shown snapshot: what it is of the file, and where it is kept, in its store or
beside a compact file."""

from __future__ import annotations

import errno
import os

from pyqmigrate.errors import TargetError
from pyqmigrate.format.snapshot_id import SnapshotId
from pyqmigrate.format.store.keys import working_set_key
from pyqmigrate.format.stream.mapped_ram_reader import read_layouts
from pyqmigrate.format.working_set import SUFFIX, WorkingSetLine
from pyqmigrate.io.own_files import write_whole
from pyqmigrate.io.plain_file import PlainFile
from pyqmigrate.io.working_set_file import (
    WORKING_SET_FILE,
    RecordedWorkingSet,
    check_working_set_place,
    working_set_path,
)
from pyqmigrate.vm.incoming.prefetch import file_ranges, within_memory

__all__ = ["check_recordable", "working_set_ranges", "write_working_set"]


def working_set_ranges(file: PlainFile) -> list[tuple[int, int]]:
    """Return the offset and length of each range of the recorded working set of a shown file, in its
    order; nothing without one, and for one of another snapshot.

    Half of the available memory is the limit. Raises SnapshotError for a damaged file, TargetError.
    """
    content = file.companions.get(SUFFIX)
    if content is None:
        return []
    line = WorkingSetLine.decode(content)
    if line.snapshot.differs_from(SnapshotId(file.size, file.mtime_ns)) is not None:
        return []
    working_set = line.decode_runs(content[line.line.length :])
    recorded = RecordedWorkingSet(line.snapshot, line.blocks, working_set, line.seconds)
    layouts = {layout.name: layout for layout in read_layouts(_Source(file))}
    return list(within_memory(file_ranges(layouts, recorded)))


class _Source:
    """The bytes of a shown file, for a parser."""

    def __init__(self, file: PlainFile) -> None:
        self._file = file
        self.size = file.size

    def read_at(self, offset: int, length: int) -> bytes:
        return bytes(self._file.read(offset, length))


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
