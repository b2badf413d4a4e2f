"""The configuration at the start of a stream: machine type, capabilities, page bits, uuid.

::

    u32 n, n bytes machine type, then subsections: 0x05, str8 name, u32 version 1, fields

A subsection has no length, so one that is not known here cannot be skipped
(docs/internals/format.md, "Configuration").
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.format.cursor import Cursor

__all__ = ["IGNORE_SHARED", "MAPPED_RAM", "Configuration", "described", "encode", "read"]

MAPPED_RAM = "mapped-ram"
IGNORE_SHARED = "x-ignore-shared"

_SUBSECTION = 0x05
_VERSION = 1
_PAGE_BITS = "configuration/target-page-bits"
_CAPABILITIES = "configuration/capabilities"
_UUID = "configuration/uuid"

_MACHINE_MAX = 4096  # bytes; real names have about twenty
_CAPABILITIES_MAX = 256  # QEMU knows about thirty, and lists two
_U32 = struct.Struct(">I")


class Configuration(NamedTuple):
    """The configuration of a stream.

    ``capabilities`` has only those that change the format (``mapped-ram``, ``x-ignore-shared``):
    multifd and direct I/O leave no trace. ``target_page_bits`` is the logarithm of the page size,
    None if the machine does not state it.
    """

    machine: str
    capabilities: tuple[str, ...] = ()
    target_page_bits: int | None = None
    uuid: bytes | None = None


def encode(configuration: Configuration) -> bytes:
    """Return the body of the CONFIGURATION element, with subsections in QEMU's order.

    Raises :class:`UsageError` if a name is too long for its field or the uuid is not 16 bytes.
    """
    machine = _utf8(configuration.machine)
    if len(machine) > _MACHINE_MAX:
        raise UsageError(f"the machine type has {len(machine)} bytes; at most {_MACHINE_MAX} fit")
    parts = [_U32.pack(len(machine)), machine]
    if configuration.target_page_bits is not None:
        parts += [_subsection(_PAGE_BITS), _U32.pack(configuration.target_page_bits)]
    if configuration.capabilities:
        parts += [_subsection(_CAPABILITIES), _U32.pack(len(configuration.capabilities))]
        parts += [_str8(name) for name in configuration.capabilities]
    if configuration.uuid is not None:
        if len(configuration.uuid) != 16:
            raise UsageError(f"a uuid has 16 bytes, not {len(configuration.uuid)}")
        parts += [_subsection(_UUID), configuration.uuid]
    return b"".join(parts)


def described(configuration: Configuration) -> dict[str, Any]:
    """Return the description of the output of :func:`encode`, in the form of QEMU's JSON.

    The entries of an array of names are listed one by one, since they differ in size.
    """
    subsections = []
    if configuration.target_page_bits is not None:
        subsections.append(_described(_PAGE_BITS, [_field("target_page_bits", "uint32", 4)]))
    if configuration.capabilities:
        several = len(configuration.capabilities) > 1
        names = [
            _field("capabilities", "capability", len(_str8(name)), index=n if several else None)
            for n, name in enumerate(configuration.capabilities)
        ]
        subsections.append(_described(_CAPABILITIES, [_field("caps_count", "uint32", 4), *names]))
    if configuration.uuid is not None:
        subsections.append(_described(_UUID, [_field("uuid.data", "uint8", 1, array_len=16)]))
    machine = _field("name", "buffer", len(_utf8(configuration.machine)))
    fields = [_field("len", "uint32", 4), machine]
    return _described("configuration", fields) | (
        {"subsections": subsections} if subsections else {}
    )


def _described(name: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {"vmsd_name": name, "version": _VERSION, "fields": fields}


def _field(
    name: str, kind: str, size: int, *, index: int | None = None, array_len: int | None = None
) -> dict[str, Any]:
    place = {"index": index, "array_len": array_len}
    given = {key: value for key, value in place.items() if value is not None}
    return {"name": name, **given, "type": kind, "size": size}


def read(cursor: Cursor) -> Configuration:
    """Read the body of the CONFIGURATION element and leave the cursor after it.

    Raises :class:`SnapshotError` for anything malformed or repeated, :class:`NotSupported`
    for a subsection that is not known.
    """
    offset = cursor.position
    length = cursor.u32("the machine type")
    if length > _MACHINE_MAX:
        raise SnapshotError(
            f"the machine type has a length of {length} bytes", offset=offset, field="machine type"
        )
    machine = cursor.take(length, "the machine type").decode("utf-8", "surrogateescape")
    capabilities: tuple[str, ...] = ()
    bits: int | None = None
    uuid: bytes | None = None
    seen: set[str] = set()
    while cursor.peek(1) == bytes([_SUBSECTION]):
        offset = cursor.position
        cursor.skip(1, "the configuration")
        name = cursor.text("the name of a configuration subsection")
        version = cursor.u32(f"subsection {name!r}")
        if name in seen:
            raise SnapshotError(f"duplicate subsection {name!r}", offset=offset)
        seen.add(name)
        if name not in (_PAGE_BITS, _CAPABILITIES, _UUID):
            raise NotSupported(
                f"configuration subsection {name!r} is not known, and has no length"
                f" to skip it by (file offset {offset:#x})"
            )
        if version != _VERSION:
            raise SnapshotError(f"subsection {name!r} has version {version}, not 1", offset=offset)
        if name == _PAGE_BITS:
            bits = cursor.u32("the target page bits")
        elif name == _CAPABILITIES:
            capabilities = _read_capabilities(cursor)
        else:
            uuid = cursor.take(16, "the uuid")
    return Configuration(machine, capabilities, bits, uuid)


def _read_capabilities(cursor: Cursor) -> tuple[str, ...]:
    offset = cursor.position
    count = cursor.u32("the capability list")
    if count > _CAPABILITIES_MAX:
        raise SnapshotError(
            f"the capability list has a length of {count} entries",
            offset=offset,
            field="capabilities",
        )
    return tuple(cursor.text("the name of a capability") for _ in range(count))


def _subsection(name: str) -> bytes:
    return bytes([_SUBSECTION]) + _str8(name) + _U32.pack(_VERSION)


def _utf8(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise UsageError(f"the name {name!r} cannot be written as UTF-8") from error


def _str8(name: str) -> bytes:
    data = _utf8(name)
    if len(data) > 255:
        raise UsageError(f"the name {name!r} has {len(data)} bytes; at most 255 fit")
    return bytes([len(data)]) + data
