"""The disks of a command line: find the options that name their images, and replace the images.

Understands ``-drive``, ``-hda`` and similar options, and ``-blockdev`` nodes. Disks that are not
local files (nbd, rbd) are listed without a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.qemu.command_line import CommandLine, Option, is_on, join_properties

__all__ = ["DiskOption", "disk_options", "with_image"]

_IMAGES = ("", "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash")
_PROTOCOLS = ("file", "host_device", "host_cdrom")
_FILTERS = ("throttle", "copy-on-read", "preallocate", "compress", "copy-before-write")
# Properties to keep when a node's image is replaced: how it is used, not what it is.
_KEPT = ("discard", "detect-zeroes", "cache.direct", "cache.no-flush")
_KEPT_OF_FILE = ("aio", "locking")


class DiskOption(NamedTuple):
    """A disk in a command line.

    ``option`` names the image, ``names`` are the ids of the drive, its nodes and its device,
    ``file`` is the image (None: not a file), ``format`` None where QEMU probes it. ``writable`` is
    whether the guest may write, ``volatile`` whether its writes are discarded (``snapshot=on``).
    """

    option: Option
    names: frozenset[str]
    file: str | None
    format: str | None
    writable: bool
    volatile: bool


def disk_options(command: CommandLine) -> list[DiskOption]:
    """Return the disks of ``command``, in order."""
    devices = [option.properties("driver") for option in command.all("device")]
    users: dict[str, set[str]] = {}
    for device in devices:
        if "drive" in device:
            users.setdefault(device["drive"], set()).update(
                name for name in (device["drive"], device.get("id")) if name
            )
    for key, value in command.merged("machine", "type").items():
        if key.startswith("pflash"):
            users.setdefault(value, set()).add(value)
    volatile = command.has("snapshot")
    disks = []
    for option in command.options:
        if option.name in _IMAGES:
            file = _path(option.value or "")
            disks.append(DiskOption(option, frozenset(), file, None, True, volatile))
        if option.name == "drive":
            disks.append(_drive(option, users, volatile))
    disks += _nodes(command, users, volatile)
    return disks


def _drive(option: Option, users: dict[str, set[str]], volatile: bool) -> DiskOption:
    properties = option.properties()
    name = properties.get("id")
    names = {name, *users.get(name, ())} if name else set()
    file = properties.get("file.filename", properties.get("file"))
    if properties.get("file.driver", "file") not in _PROTOCOLS:
        file = None
    return DiskOption(
        option,
        frozenset(n for n in (*names, properties.get("node-name")) if n),
        None if file is None else _path(file),
        properties.get("driver", properties.get("format")),
        not _is_read_only(properties) and properties.get("media") != "cdrom",
        volatile or is_on(properties.get("snapshot")),
    )


def _nodes(
    command: CommandLine, users: dict[str, set[str]], volatile: bool
) -> Iterator[DiskOption]:
    """Yield the ``-blockdev`` nodes with an image format: below filters, above protocols."""
    nodes = {
        properties["node-name"]: (option, properties)
        for option in command.all("blockdev")
        if "node-name" in (properties := option.properties("driver"))
    }
    below = {p["file"] for _, p in nodes.values() if "file" in p}
    for top in nodes:
        if top in below or top not in users:
            continue
        names, name, writable = set(users[top]), top, True
        while True:
            option, properties = nodes[name]
            names.add(name)
            writable = writable and not _is_read_only(properties)
            under = properties.get("file")
            if properties.get("driver") not in _FILTERS or under not in nodes:
                break
            name = under
        yield DiskOption(
            option,
            frozenset(names),
            _file_of(properties, nodes),
            properties.get("driver"),
            writable,
            volatile,
        )


def _file_of(
    properties: dict[str, str], nodes: dict[str, tuple[Option, dict[str, str]]]
) -> str | None:
    if properties.get("file") in nodes:
        inner = nodes[properties["file"]][1]
    elif properties.get("driver") in _PROTOCOLS:
        inner = properties
    else:
        front = "file."
        inner = {k.removeprefix(front): v for k, v in properties.items() if k.startswith(front)}
    if inner.get("driver", "file") not in _PROTOCOLS or "filename" not in inner:
        return None
    return _path(inner["filename"])


def _path(name: str) -> str | None:
    """Return the path in an image's name; None for a URL or a ``json:`` description."""
    if name.startswith("file:"):
        return name.removeprefix("file:")
    return None if ":" in name.partition("/")[0] else name


def _is_read_only(properties: dict[str, str]) -> bool:
    return any(is_on(properties.get(key)) for key in ("readonly", "read-only"))


def with_image(
    command: CommandLine, disk: DiskOption, file: str, form: str = "qcow2"
) -> CommandLine:
    """Return ``command`` with ``file``, of format ``form``, as the image of ``disk``.

    Backing images are those that ``file`` names. Raises UsageError if a property of the old image
    would be lost.
    """
    option = disk.option
    if option.name in _IMAGES:
        return command.replaced({option: Option(option.name, file, option.word)})
    properties = option.properties("driver" if option.name == "blockdev" else None)
    for key in properties:
        if key.endswith("key-secret") or key in ("offset", "size"):
            raise UsageError(
                f"{option} cannot be replaced by an overlay because of {key}: make the overlay "
                "yourself and give the whole command line after --"
            )
    replace = _replaced_drive if option.name == "drive" else _replaced_node
    value = replace(properties, file, form)
    return command.replaced({option: Option(option.name, value, option.word)})


def _replaced_drive(properties: dict[str, str], file: str, form: str) -> str:
    kept = {
        key: value
        for key, value in properties.items()
        if key not in ("file", "file.filename", "file.driver", "format", "driver")
        and not key.startswith("backing")
    }
    made = join_properties("", {"file": file, "format": form, **kept})
    return made.removeprefix(",")


def _replaced_node(properties: dict[str, str], file: str, form: str) -> str:
    inner: dict[str, Any] = {"driver": "file", "filename": file}
    for key in _KEPT_OF_FILE:
        if f"file.{key}" in properties:
            inner[key] = properties[f"file.{key}"]
    node: dict[str, Any] = {"driver": form, "node-name": properties["node-name"], "file": inner}
    for key in _KEPT:
        if key in properties:
            front, _, last = key.partition(".")
            value = properties[key]
            if last:
                node.setdefault(front, {})[last] = is_on(value)
            else:
                node[front] = value
    if _is_read_only(properties):
        node["read-only"] = True
    # JSON, which QEMU takes for all types of values.
    return json.dumps(node)
