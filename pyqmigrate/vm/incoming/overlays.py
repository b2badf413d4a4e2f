"""New overlays over the disks of a snapshot, one for each guest that is restored from it.

They are the guest's once it runs: they hold what it has written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from pyqmigrate.errors import TargetError, UsageError
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
    """``command`` with a new overlay in place of each disk, and what they are; all or none.

    They are made in ``directory`` and named ``SNAPSHOT.DISK.qcow2``, after ``label`` where there is
    one. Raises UsageError where a disk cannot be replaced, TargetError.
    """
    front = f"{label}.{snapshot}" if label else snapshot
    with contextlib.ExitStack() as undo:
        made = []
        for disk, option in pairs:
            assert option is not None
            path = _make(disk, directory, front)
            undo.callback(path.unlink, missing_ok=True)
            command = with_image(command, option, os.fspath(path))
            made.append((disk, path))
        undo.pop_all()
        return command, made


def _make(disk: DiskRecord, directory: Path, front: str) -> Path:
    """A new qcow2 over the disk's file, in which nothing has been written."""
    base = os.fsencode(disk.file)
    if len(base) > BACKING_MAX:
        raise UsageError(f"the name of {disk.file!r} is too long for an image over it")
    if not 0 < disk.images[0].size <= SIZE_MAX:
        raise UsageError(f"no image over {disk.file!r} can have {disk.images[0].size} bytes")
    name = overlay_name(
        [front], disk.name.rpartition("/")[2], lambda name: os.path.lexists(directory / name)
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
            os.link(provisional, path)  # never over a file that has the name by now
        finally:
            os.close(fd)
            provisional.unlink()
    except OSError as error:
        raise TargetError(
            error.errno or errno.EIO, f"cannot make an overlay of disk {disk.name}", path
        ) from error
    return path
