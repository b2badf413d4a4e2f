"""Check that the disks of a command line are those that a snapshot's memory belongs to.

Memory of one instant must not run on disks of another: the guest would overwrite them with stale
cached data. A record lists the guest's files and evidence of their state at the snapshot's instant,
which is compared with their current state. Images are opened for reading only.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from pyqmigrate.vm.qemu.command_line import CommandLine
from pyqmigrate.vm.qemu.disk_options import DiskOption, disk_options
from pyqmigrate.vm.record.contents import DiskRecord, Image, ImageState, VmRecord
from pyqmigrate.vm.record.disk_identity import Qcow2, look_at_image, look_at_qcow2

__all__ = ["DiskFindings", "Pair", "check_disks", "is_path", "pair_disks"]

_START, _SAMPLES, _SAMPLE = 1 << 20, 64, 4096  # bytes at the start, places, bytes in each
_DEPTH = 200  # images one over another, at most: QEMU's own limit


class Pair(NamedTuple):
    """A disk of the snapshot, and the same disk in the command line, if any."""

    disk: DiskRecord
    option: DiskOption | None


class DiskFindings(NamedTuple):
    """The result of the check.

    ``faults`` are reasons against a restore, ``notes`` other remarks. ``needs_overlay`` are the
    disks that get new overlays, over unchanged images.
    """

    faults: list[str]
    notes: list[str]
    needs_overlay: list[Pair]


def pair_disks(command: CommandLine, record: VmRecord) -> list[Pair]:
    """Pair each writable, attached disk of the snapshot with one of ``command``: by names, then by
    files, then by the order of the remaining ones."""
    options = disk_options(command)
    disks = [disk for disk in record.disks if disk.writable and disk.qdev]
    pairs: dict[int, DiskOption] = {}

    def pair(number: int, option: DiskOption) -> None:
        pairs[number] = option
        options.remove(option)

    for number, disk in enumerate(disks):
        names = {name for name in (disk.device, disk.node, _device_id(disk)) if name}
        for option in options:
            if option.names & names:
                pair(number, option)
                break
    for number, disk in enumerate(disks):
        if number not in pairs:
            for option in options:
                if _shares_a_file(command, disk, option):
                    pair(number, option)
                    break
    left = [number for number in range(len(disks)) if number not in pairs]
    writable = [option for option in options if option.writable]
    if len(left) == len(writable):
        for number, option in zip(left, writable, strict=True):
            pair(number, option)
    return [Pair(disk, pairs.get(number)) for number, disk in enumerate(disks)]


def check_disks(
    command: CommandLine, record: VmRecord, snapshot: str, *, overlays: bool = False
) -> DiskFindings:
    """Compare the disks of ``command`` with ``record``; ``snapshot`` is its file, for messages.

    ``overlays``: each disk gets a new overlay if possible, so that only the state of the images
    matters. Blocks while it reads the images' headers.
    """
    findings = DiskFindings([], [], [])
    for pair in pair_disks(command, record):
        if pair.option is None:
            _missing(command, pair.disk, findings)
        elif pair.option.file is None or not is_path(pair.disk.file):
            _out_of_sight(pair, findings)
        else:
            _compare(command, pair, snapshot, overlays, findings)
    return findings


def _compare(
    command: CommandLine, pair: Pair, snapshot: str, overlays: bool, findings: DiskFindings
) -> None:
    disk, option = pair
    assert option is not None and option.file is not None
    given = _resolved(command, option.file)
    changes = _changes(disk)
    base, line = disk.file, _overlay_line(disk, snapshot)
    if disk.images[0].state is None and not os.path.lexists(base):
        findings.faults.append(
            f"disk {disk.name}: {base!r}, which the snapshot belongs to, does not exist "
            f"(-snapshot and snapshot=on make a temporary file): its data is not in {given!r}"
        )
        return
    if overlays and not changes and not _same(given, base) and not _is_unseen(disk):
        findings.needs_overlay.append(pair)
        return
    if disk.continued_in is not None and _same(given, disk.continued_in):
        what = (
            f"disk {disk.name}: {given!r} is where the guest went on after the snapshot, which "
            f"belongs to {base!r}"
        )
        findings.faults.append(_with_cure(what, changes, line))
        return
    if _same(given, base):
        _compare_base(pair, given, changes, line, overlays, findings)
        return
    above, bottom = _images_over(given, disk)
    if bottom is not None:  # an overlay over the disk, or a copy of it
        written = next((name for name, image in above if not image.is_empty), None)
        if written is not None:
            what = (
                f"disk {disk.name}: {written!r} has been written to since it was made over "
                f"{base!r}: another guest has run on it"
            )
            findings.faults.append(_with_cure(what, changes, line))
        elif changes and _same(bottom, base):
            findings.faults.append(
                f"disk {disk.name}: {given!r} is based on a file that has gone ahead: {changes}"
            )
    elif not os.path.exists(given) or _is_copy(given, disk.images[0]):
        return  # QEMU reports what it cannot open
    elif not changes and _resembles(given, disk.images[0]):
        findings.notes.append(
            f"disk {disk.name}: {given!r} must be a copy of {base!r} on which no guest has run: "
            "this is assumed, not checked (an overlay would show it)"
        )
    else:
        findings.faults.append(
            _with_cure(
                f"disk {disk.name}: the snapshot belongs to {base!r}, and it is unknown whether "
                f"{given!r} is the same (a copy that keeps the times is recognized: cp -p)",
                changes,
                line,
            )
        )


def _compare_base(
    pair: Pair, given: str, changes: str, line: str, overlays: bool, findings: DiskFindings
) -> None:
    disk, option = pair
    assert option is not None
    if changes:
        findings.faults.append(
            f"disk {disk.name} has gone ahead of the snapshot: {changes}; give a copy of the disk "
            "as it was then (vm save --with-disks keeps it)"
        )
        return
    if _is_unseen(disk):
        findings.faults.append(
            f"disk {disk.name}: the guest went on writing to {given!r} after the save, and its "
            "changes cannot be seen"
        )
        return
    writes = option.writable and not option.volatile
    if writes and disk.continued_in is not None and os.path.lexists(disk.continued_in):
        if overlays:
            findings.needs_overlay.append(pair)
            return
        findings.faults.append(
            f"disk {disk.name}: {given!r} is the backing file of {disk.continued_in!r}, in which "
            f"the guest goes on, and writing to it would corrupt that: {line}, and "
            "give that file; or --with-disks"
        )
    elif overlays and writes:
        findings.needs_overlay.append(pair)


def _missing(command: CommandLine, disk: DiskRecord, findings: DiskFindings) -> None:
    what = f"the snapshot's VM has a disk {disk.name} ({disk.format}, {disk.file})"
    if command.has("readconfig"):
        findings.notes.append(f"{what}, which is not checked: -readconfig may describe it")
    else:
        findings.faults.append(f"{what}, but the command line has none: give it")


def _out_of_sight(pair: Pair, findings: DiskFindings) -> None:
    """Report on a disk that is not a local file."""
    disk, option = pair
    assert option is not None
    if disk.goes_on and option.file is None:
        findings.faults.append(
            f"disk {disk.name}: the guest went on writing to {disk.file!r} after the save, and "
            "its content cannot be seen from here"
        )
    else:
        findings.notes.append(
            f"disk {disk.name} must have the content of {disk.file!r} at the snapshot's instant: "
            "this cannot be checked from here"
        )


def _with_cure(what: str, changes: str, line: str) -> str:
    if changes:
        return f"{what}; that has gone ahead, too: {changes}"
    return f"{what}: {line}, and give that file; or --with-disks"


def _changes(disk: DiskRecord) -> str:
    """Describe how an image of the disk has changed; empty if no change is seen."""
    for image in disk.images:
        if image.state is None:
            continue
        now = look_at_image(image.file, qcow2=image.format == "qcow2")
        if now is None:
            return f"{image.file!r} no longer exists, or cannot be read"
        if change := _change(image.state, now):
            return f"{image.file!r} {change}"
    return ""


def _change(then: ImageState, now: ImageState) -> str:
    if now.size != then.size:
        return f"has {now.size} bytes, but had {then.size} at the save"
    if now.mtime_ns != then.mtime_ns:
        return f"was written to at {_time(now.mtime_ns)}, after {_time(then.mtime_ns)}"
    if then.qcow2 is not None and now.qcow2 != then.qcow2:
        return "has changed since the save, as its tables show"
    return ""


def _time(ns: int) -> str:
    seconds, rest = divmod(ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{rest // 1_000_000:03}"


def _is_copy(file: str, image: Image) -> bool:
    """Return whether a file looks like a copy of ``image`` as recorded."""
    if image.state is None:
        return False
    now = look_at_image(file, qcow2=image.format == "qcow2")
    if now is None or now.size != image.state.size:
        return False
    return now.mtime_ns == image.state.mtime_ns and now.qcow2 == image.state.qcow2


def _resembles(file: str, image: Image) -> bool:
    """Return whether a file with other times has the size, the qcow2 tables and some bytes of the
    unchanged ``image``."""
    now = look_at_image(file, qcow2=image.format == "qcow2")
    if now is None or image.state is None:
        return False
    if (now.size, now.qcow2) != (image.state.size, image.state.qcow2):
        return False
    step = max(now.size // _SAMPLES, 1)
    pieces = [(0, _START), *((offset, _SAMPLE) for offset in range(0, now.size, step))]
    try:
        with open(file, "rb") as copy, open(image.file, "rb") as original:
            return all(
                os.pread(copy.fileno(), length, offset)
                == os.pread(original.fileno(), length, offset)
                for offset, length in pieces
            )
    except OSError:
        return False


def _is_unseen(disk: DiskRecord) -> bool:
    """Return whether the guest went on writing to it, and changes cannot be seen."""
    return disk.images[0].state is None and disk.goes_on


def _images_over(file: str, disk: DiskRecord) -> tuple[list[tuple[str, Qcow2]], str | None]:
    """Return the images from ``file`` down to the file of ``disk`` or a copy of it, and that file;
    None if it is not below."""
    images: list[tuple[str, Qcow2]] = []
    for _ in range(_DEPTH):
        image = look_at_qcow2(file)
        if image is None or image.backing is None:
            break
        images.append((file, image))
        directory = os.path.dirname(file)
        file = os.path.join(directory, image.backing.removeprefix("file:"))
        if _same(file, disk.file) or _is_copy(file, disk.images[0]):
            return images, file
    return [], None


def _overlay_line(disk: DiskRecord, snapshot: str) -> str:
    import shlex  # for a refusal only

    front = f"{os.fspath(snapshot)}.{disk.name.rpartition('/')[2]}"
    words = [
        "qemu-img",
        "create",
        "-f",
        "qcow2",
        "-b",
        disk.file,
        "-F",
        disk.format,
        f"{front}.qcow2",
    ]
    return f"make a new overlay over it ({shlex.join(words)})"


def _device_id(disk: DiskRecord) -> str:
    front = "/machine/peripheral/"
    if not disk.qdev.startswith(front):
        return "" if "/" in disk.qdev else disk.qdev
    return disk.qdev.removeprefix(front).partition("/")[0]


def _shares_a_file(command: CommandLine, disk: DiskRecord, option: DiskOption) -> bool:
    if option.file is None:
        return False
    given = _resolved(command, option.file)
    names = [image.file for image in disk.images]
    if disk.continued_in is not None:
        names.append(disk.continued_in)
    return any(_same(given, name) for name in names) or _images_over(given, disk)[1] is not None


def _resolved(command: CommandLine, file: str) -> str:
    return os.path.join(command.directory or "", file)


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def is_path(file: str) -> bool:
    """Return whether the file of an image is a path, not a description."""
    return not file.startswith("json:") and ":" not in file.partition("/")[0]
