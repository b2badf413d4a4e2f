"""New overlays over the disks of a snapshot, one for each restored guest.

They belong to the guest once it runs: they contain what it has written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from pyqmigrate.errors import UsageError, target_error
from pyqmigrate.format.qcow2 import BACKING_MAX, SIZE_MAX, encode_overlay
from pyqmigrate.vm.guest.overlay_names import overlay_name
from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.disk_options import with_image
from pyqmigrate.vm.record.contents import DiskRecord
from pyqmigrate.vm.record.disk_check import Pair

__all__ = ["with_overlays"]


def with_overlays(
    command: CommandLine, pairs: Sequence[Pair], directory: Path, snapshot: str, label: str
) -> tuple[CommandLine, list[tuple[DiskRecord, Path]]]:
    """Return ``command`` with a new overlay in place of each disk, and the overlays; all or none.

    They are created in ``directory`` and named ``[LABEL.]SNAPSHOT.DISK.qcow2``. Raises UsageError if
    a disk cannot be replaced, TargetError.
    """
    prefix = f"{label}.{snapshot}" if label else snapshot
    with contextlib.ExitStack() as undo:
        overlays = []
        for disk, option in pairs:
            assert option is not None
            path = _create(disk, directory, prefix)
            undo.callback(path.unlink, missing_ok=True)
            command = with_image(command, option, os.fspath(path))
            overlays.append((disk, path))
        undo.pop_all()
        return command, overlays


def _create(disk: DiskRecord, directory: Path, prefix: str) -> Path:
    """Create an empty qcow2 over the disk's file."""
    base = os.fsencode(disk.file)
    if len(base) > BACKING_MAX:
        raise UsageError(f"the name of {disk.file!r} is too long for a backing file")
    if not 0 < disk.images[0].size <= SIZE_MAX:
        raise UsageError(f"an overlay of {disk.file!r} cannot have {disk.images[0].size} bytes")
    name = overlay_name(
        [prefix], disk.name.rpartition("/")[2], lambda name: os.path.lexists(directory / name)
    )
    path = (directory / name).absolute()
    provisional = path.with_name(f".{secrets.token_hex(8)}.qcow2")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(provisional, flags, 0o600)
        try:
            for offset, data in encode_overlay(disk.images[0].size, base, disk.format):
                if os.pwrite(fd, data, offset) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
            os.link(provisional, path)  # never replaces an existing file
        finally:
            os.close(fd)
            provisional.unlink()
    except OSError as error:
        raise target_error(error, f"cannot create an overlay of disk {disk.name}", path) from error
    return path
