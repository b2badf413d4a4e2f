"""The record of a save: ``SNAPSHOT.vm.json``, with what a restore must know about the VM.

A mapped-ram file contains the guest's memory and device state, but neither the command line that
makes the same devices nor anything about disks. ``vm save`` records both beside the snapshot::

    record = read_record("/snap/guest.mapped")       # None where there is no record
    record.command                                   # ("qemu-system-x86_64", "-m", "4G", ...)
    record.disks[0].file                             # the image at the snapshot's instant

``docs/vm-record.md`` describes the file. It is untrusted: :func:`decode_record` checks every value
and its size. Sizes are in bytes, times in nanoseconds since 1970.

The values are named tuples, which are faster to define than dataclasses: a restore reads a record
before it starts QEMU.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

from pyqmigrate.errors import SnapshotError, target_error
from pyqmigrate.vm.record.place import record_path

__all__ = [
    "FORMAT",
    "VERSION",
    "Backend",
    "Block",
    "Cpus",
    "Device",
    "DiskRecord",
    "Image",
    "ImageState",
    "MachineRecord",
    "RecordedQemu",
    "SaveFacts",
    "VmRecord",
    "decode_record",
    "encode_record",
    "is_record",
    "read_record",
    "record_path",
]

FORMAT = "pyqmigrate vm record"
VERSION = 1
_HEAD = f'{{\n  "format": "{FORMAT}",'.encode()

# Bounds on an untrusted file: well above what any guest has.
_FILE_MAX = 8 << 20  # bytes
_TEXT_MAX = 1 << 20  # characters of one text
_ITEMS_MAX = 1 << 16  # of one list
_NUMBER_MAX = (1 << 64) - 1
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


class RecordedQemu(NamedTuple):
    """The QEMU that was saved.

    ``version`` is QEMU's own ("10.0.2"), ``binary`` the path of the program, empty if unknown.
    ``command`` are the words of its command line, the program first, None if they could not be
    read; ``redacted`` are the indexes of words from which secrets were removed. ``directory`` is
    the one that relative names start from, None if unknown.
    """

    version: str
    binary: str
    command: tuple[str, ...] | None
    redacted: tuple[int, ...]
    directory: str | None


class MachineRecord(NamedTuple):
    """``type`` is the full name (``pc-i440fx-10.0``), ``target`` the architecture (``x86_64``),
    ``accelerator`` ``kvm``, ``tcg`` or None if unknown, ``memory`` the bytes given by ``-m`` and
    ``plugged`` those added later (None: unknown)."""

    type: str
    target: str
    accelerator: str | None
    uuid: str
    memory: int | None
    plugged: int | None


class Cpus(NamedTuple):
    """``number`` CPUs of QOM type ``type``, of ``maximum`` possible ones (0: unknown).

    ``topology`` has the number of different ids at each level of the possible CPUs
    (``{"socket": 1, "core": 2, "thread": 1}``).
    """

    number: int
    maximum: int
    type: str
    topology: Mapping[str, int]


class Device(NamedTuple):
    """A device by its QOM path (``/machine/peripheral/ID`` for those that have an id) and type."""

    path: str
    type: str


class Backend(NamedTuple):
    """A memory backend: id, QOM type, bytes, and whether its memory is shared."""

    id: str
    type: str
    size: int
    share: bool


class Block(NamedTuple):
    """A RAM block of the stream: name and bytes."""

    name: str
    length: int


class ImageState(NamedTuple):
    """Evidence of changes to an image file: bytes, modification time (ns), device and inode.

    ``qcow2`` is a digest of a qcow2's header and tables
    (:mod:`pyqmigrate.vm.record.disk_identity`), None for other formats.
    """

    size: int
    mtime_ns: int
    device: int
    inode: int
    qcow2: str | None


class Image(NamedTuple):
    """One file of a disk. ``file`` is absolute where it is a path, otherwise QEMU's description
    (``json:...``, ``nbd://...``); ``size`` is the virtual size in bytes; ``state`` None unless it
    is a readable regular file."""

    file: str
    format: str
    size: int
    state: ImageState | None


class DiskRecord(NamedTuple):
    """A disk of the guest at the snapshot's instant.

    ``device``, ``qdev`` and ``node`` are QEMU's names for it. ``images`` are the file that the
    guest had and its backing files, in that order. ``continued_in`` is the overlay in which the
    guest went on (``--with-disks``), None where it kept its file; ``goes_on`` says whether it went
    on writing into ``images[0]``.
    """

    device: str
    qdev: str
    node: str
    writable: bool
    images: tuple[Image, ...]
    continued_in: str | None
    goes_on: bool

    @property
    def file(self) -> str:
        return self.images[0].file

    @property
    def format(self) -> str:
        return self.images[0].format

    @property
    def name(self) -> str:
        """The name to show to people."""
        return self.device or self.qdev.removesuffix("/virtio-backend") or self.node


class SaveFacts(NamedTuple):
    """How the snapshot was made: ``engine`` and its ``way`` (None with engine qemu), the
    algorithm of the ``seal`` that was asked for, the migration ``capabilities`` that were on, the
    ``run_state`` that was saved, whether the guest ``resumed``, and the time of the snapshot."""

    engine: str
    way: str | None
    seal: str | None
    capabilities: tuple[str, ...]
    run_state: str
    resumed: bool
    instant_ns: int


class VmRecord(NamedTuple):
    """The record of one save.

    ``snapshot`` is the file's name, ``identity`` a digest of its device state, which ties the
    record to the file beside it
    (:func:`pyqmigrate.vm.record.snapshot_identity.identify`).
    """

    snapshot: str
    identity: str
    qemu: RecordedQemu
    machine: MachineRecord
    cpus: Cpus
    devices: tuple[Device, ...]
    backends: tuple[Backend, ...]
    blocks: tuple[Block, ...]
    disks: tuple[DiskRecord, ...]
    save: SaveFacts

    @property
    def command(self) -> tuple[str, ...] | None:
        """The words of QEMU's command line, the program first; None if unknown."""
        return self.qemu.command


def is_record(head: bytes) -> bool:
    """Return whether a file with this head is a record, of any version."""
    return head.startswith(_HEAD)


def encode_record(record: VmRecord) -> bytes:
    """Return the bytes of the file: JSON in ASCII, since a command line may have any bytes."""
    data = {"format": FORMAT, "version": VERSION, **_to_json(record)}
    return json.dumps(data, indent=2).encode() + b"\n"


def decode_record(text: bytes) -> VmRecord:
    """Return the record in the bytes of a file.

    Raises SnapshotError, whose ``field`` is ``record`` or a path in it, for an invalid record.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"the record is not JSON ({error})", field="record") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SnapshotError("this is not a record of vm save", field="record")
    if data.get("version") != VERSION:
        raise SnapshotError(
            f"the record has version {data.get('version')!r}, only {VERSION} is supported",
            field="record",
        )
    record: VmRecord = _read(data, "VmRecord", "record")
    if any(not disk.images for disk in record.disks):
        raise SnapshotError("a disk has no image", field="record.disks")
    return record


def read_record(snapshot: str | os.PathLike[str]) -> VmRecord | None:
    """Return the record beside a snapshot, or None.

    Does not check that it belongs to the snapshot. Raises SnapshotError for a file that is not a
    record, TargetError if it cannot be read.
    """
    path = record_path(snapshot)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise target_error(error, "cannot open the record", path) from error
    try:
        return decode_record(_content(fd))
    except OSError as error:
        raise target_error(error, "cannot read the record", path) from error
    except SnapshotError as error:
        raise SnapshotError(f"{os.fspath(path)!r}: {error}") from error
    finally:
        os.close(fd)


def _content(fd: int) -> bytes:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise SnapshotError("this is not a regular file", field="record")
    if info.st_size > _FILE_MAX:
        raise SnapshotError(
            f"the record has {info.st_size} bytes; the limit is {_FILE_MAX}", field="record"
        )
    pieces = []
    while piece := os.read(fd, _FILE_MAX):
        pieces.append(piece)
    return b"".join(pieces)


_CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        VmRecord,
        RecordedQemu,
        MachineRecord,
        Cpus,
        Device,
        Backend,
        Block,
        DiskRecord,
        Image,
        ImageState,
        SaveFacts,
    )
}


def _read(value: Any, kind: str, place: str) -> Any:
    """Return the JSON ``value`` as a value of the annotation ``kind``; ``place`` is for errors."""
    if kind.endswith(" | None"):
        return None if value is None else _read(value, kind.removesuffix(" | None"), place)
    if kind.startswith("tuple["):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(
            _read(item, inner, f"{place}[{number}]")
            for number, item in enumerate(_sized(value, list, place))
        )
    if kind == "Mapping[str, int]":
        items = _sized(value, dict, place).items()
        return {key: _read(number, "int", f"{place}.{key}") for key, number in items}
    if kind in _CLASSES:
        given = _sized(value, dict, place)
        found = {}
        for name, annotation in _annotations(kind).items():
            if name not in given:
                raise SnapshotError("missing in the record", field=f"{place}.{name}")
            found[name] = _read(given[name], annotation, f"{place}.{name}")
        return _CLASSES[kind](**found)
    return _plain(value, kind, place)


def _annotations(kind: str) -> dict[str, str]:
    """Return the fields of a class and their annotations, as text."""
    annotations = _CLASSES[kind].__annotations__
    return {name: getattr(a, "__forward_arg__", a) for name, a in annotations.items()}


def _to_json(value: Any) -> Any:
    """Convert for JSON: named tuples become objects, other tuples lists."""
    if hasattr(value, "_fields"):
        return {name: _to_json(getattr(value, name)) for name in value._fields}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _sized(value: Any, kind: type[list[Any]] | type[dict[str, Any]], place: str) -> Any:
    if type(value) is not kind or len(value) > _ITEMS_MAX:
        raise SnapshotError(f"this is not a {kind.__name__} of reasonable size", field=place)
    return value


def _is_system_text(text: str) -> bool:
    """Return whether it can be a command-line argument or a path."""
    try:
        return len(text) <= _TEXT_MAX and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _plain(value: Any, kind: str, place: str) -> str | int | bool:
    if kind == "str" and isinstance(value, str) and _is_system_text(value):
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and type(value) is int and 0 <= value <= _NUMBER_MAX:
        return value
    raise SnapshotError(f"{str(value)[:40]!r} is not a valid {kind}", field=place)
