"""A save image that ``virsh restore`` takes: libvirt's header before a sequential stream.

    convert("guest.mapped", "new.save", to="libvirt", like="old.save")

The header comes from an older image of the same domain: its XML and cookie are copied, format and
run state are set. libvirt starts the domain with that XML, so it must describe the machine of the
snapshot; only the machine type is compared here.
"""

from __future__ import annotations

import contextlib
import os
import re

from pyqmigrate.errors import UsageError
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.io.input import InputFile
from pyqmigrate.io.stream_file import read_libvirt_header
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.provenance import run_state

__all__ = ["ImageHeader", "image_header"]

_FORMATS = {"raw": ImageFormat.RAW, "sparse": ImageFormat.SPARSE}
_MACHINE = re.compile(r"<type\b[^>]*\bmachine=(['\"])(.*?)\1")


class ImageHeader:
    """The bytes before the stream, and whether the stream is ``sparse`` (mapped-ram)."""

    def __init__(self, header: LibvirtHeader) -> None:
        self.sparse = header.format is ImageFormat.SPARSE
        self.data = encode_header(header)


def image_header(
    snapshot: Snapshot, like: str | os.PathLike[str], image_format: str | None
) -> ImageHeader:
    """Return the header for an image of ``snapshot``, made from that of the image ``like``.

    image_format: ``raw`` or ``sparse`` (libvirt 11.2 and later); None is that of ``like``, or raw if
        that is compressed.

    Raises UsageError if ``like`` is not an image of libvirt's or belongs to a domain of another
    machine type, SnapshotError for a damaged header, TargetError.
    """
    if image_format is not None and image_format not in _FORMATS:
        raise UsageError(f"image_format must be 'raw' or 'sparse', not {image_format!r}")
    with contextlib.closing(InputFile(like)) as source:
        old = read_libvirt_header(source)
    if old is None:
        raise UsageError(f"{source.name!r} is not a save image of libvirt's (virsh save)")
    machine = _MACHINE.search(old.xml)
    if machine is not None and snapshot.machine and machine[2] != snapshot.machine:
        raise UsageError(
            f"the snapshot is of a machine {snapshot.machine!r}, but the domain of "
            f"{source.name!r} has {machine[2]!r}: give an image of the same domain"
        )
    chosen = ImageFormat.RAW if old.format.compressed else old.format
    if image_format is not None:
        chosen = _FORMATS[image_format]
    running = _was_running(snapshot)
    return ImageHeader(
        old._replace(
            complete=True,
            format=chosen,
            was_running=old.was_running if running is None else running,
        )
    )


def _was_running(snapshot: Snapshot) -> bool | None:
    """Whether libvirt should let the guest run; None if only the end of the stream says so."""
    if snapshot.libvirt is not None:
        return snapshot.libvirt.was_running
    if snapshot.source.forward:
        return None
    state = run_state(snapshot)
    return None if state is None else state == "running"
