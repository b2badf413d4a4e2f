"""Find out what wrote a snapshot, and whether QEMU would load it.

No file names its writer. A file does record the machine type, features that need certain versions of
QEMU, and libvirt's header.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyqmigrate.argument_types import check
from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.device.sections import DeviceSection, run_state_of
from pyqmigrate.format.stream.configuration import IGNORE_SHARED, MAPPED_RAM
from pyqmigrate.format.stream.wire import SectionKind
from pyqmigrate.io.bitmap_order import better_order, says_better
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["Provenance", "provenance", "run_state"]

_VERSIONED = re.compile(r"-(\d+)\.(\d+)$")
_RUN_STATE_MAX = 4096  # bytes of the section that has the run state; it has 104


@dataclass(frozen=True)
class Provenance:
    """``qemu`` is the oldest version ``(major, minor)`` that can have written the file, or None,
    and ``reasons`` says why. ``libvirt`` says that libvirt saved it.

    ``loadable`` says whether a QEMU of that version or later, with the same machine and
    capabilities, would load it; ``obstacles`` say why not, ``remarks`` what to know for a load.
    ``run_state`` is the state of the guest after a load (``running``), None if not recorded.
    """

    qemu: tuple[int, int] | None
    reasons: tuple[str, ...]
    libvirt: bool
    loadable: bool
    obstacles: tuple[str, ...]
    remarks: tuple[str, ...]
    run_state: str | None


def provenance(snapshot: Snapshot) -> Provenance:
    """Judge an open snapshot. For a sequential stream this makes its pass over the file, and raises
    the errors of that."""
    check("the snapshot", snapshot, Snapshot)
    found = _signs(snapshot)
    obstacles = _obstacles(snapshot)
    return Provenance(
        qemu=max((version for version, _ in found), default=None),
        reasons=tuple(reason for _, reason in found),
        libvirt=snapshot.libvirt is not None,
        loadable=not obstacles,
        obstacles=obstacles,
        remarks=_remarks(snapshot),
        run_state=run_state(snapshot),
    )


def _signs(snapshot: Snapshot) -> list[tuple[tuple[int, int], str]]:
    stream = snapshot.stream
    signs = []
    version = _VERSIONED.search(stream.machine)
    if version:
        signs.append(((int(version[1]), int(version[2])), f"machine type {stream.machine}"))
    if MAPPED_RAM in stream.capabilities:
        signs.append(((9, 0), "mapped-ram"))
        if any(block.external for block in snapshot.blocks.values()):
            signs.append(((11, 0), "blocks of a mapped-ram file that are kept elsewhere"))
    if any(s.kind is SectionKind.COMMAND and s.name == "switchover-start" for s in stream.sections):
        signs.append(((10, 0), "the command switchover-start"))
    return signs


def _obstacles(snapshot: Snapshot) -> tuple[str, ...]:
    stream = snapshot.stream
    found = []
    if not stream.complete:
        found.append("the end of the stream was not seen: device state may be cut off")
    try:
        snapshot.verify()
    except SnapshotError as error:
        if stream.complete:
            found.append(str(error))
    if MAPPED_RAM in stream.capabilities and stream.background:
        found.append(
            "a background snapshot without bitmaps, which QEMU would load as zeros: convert it to "
            "mapped-ram first"
        )
    return tuple(found)


def _remarks(snapshot: Snapshot) -> tuple[str, ...]:
    stream = snapshot.stream
    found = []
    if MAPPED_RAM in stream.capabilities:
        found.append("QEMU needs the capability mapped-ram on, from 9.0")
        if IGNORE_SHARED in stream.capabilities:
            found.append("QEMU before 11.0 cannot load mapped-ram together with x-ignore-shared")
    elif stream.background:
        found.append("a background snapshot: it holds the instant at which the save began")
    order = snapshot.bitmap_order
    if order is not None and not stream.background:
        better = better_order(snapshot.source, snapshot.layouts, order)
        if better is not None:
            found.append(says_better(better))
        if order == "big":
            found.append("QEMU on a little-endian host would misread its bitmaps")
    if IGNORE_SHARED in stream.capabilities:
        found.append("QEMU needs the capability x-ignore-shared on, and the blocks kept elsewhere")
    if not stream.machine:
        found.append("it names no machine type: any machine takes it")
    if not snapshot.blocks:
        found.append("it has no RAM: only a machine without RAM takes it")
    if not any(s.kind is SectionKind.FULL for s in stream.sections) and not stream.opaque_tail:
        found.append("it has no device state: the guest begins as after a reset")
    if stream.description is None:
        found.append("it has no description: QEMU remarks on that and loads it")
    if stream.uuid is not None:
        found.append("a QEMU that validates uuids needs the same one")
    return tuple(found)


def run_state(snapshot: Snapshot) -> str | None:
    """Return QEMU's name for the state of the guest after a load; None if it is not recorded."""
    if not snapshot.stream.complete:
        return None
    for s in snapshot.stream.sections:
        if s.kind is SectionKind.FULL and s.name == "globalstate":
            data = snapshot.source.read_at(s.body_offset, min(s.body_length, _RUN_STATE_MAX))
            return run_state_of([DeviceSection(s.name, data, s.instance_id, s.version_id)])
    return None
