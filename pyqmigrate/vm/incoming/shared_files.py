"""Find the files and servers that a QEMU command line writes to, and the sockets that it makes.

Two guests must not share them. Only the command line and the files of its ``-readconfig`` are read;
no image is opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pyqmigrate.vm.qemu.command_line import CommandLine, Option, flatten, is_on
from pyqmigrate.vm.qemu.readconfig import with_configurations

__all__ = ["written_files", "written_images"]

_IMAGES = ("", "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash")
_STREAMS = ("qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "gdb", "vnc")
# Patterns are strings, compiled when first used: a restore waits for each import.
_STREAM = r"(?:^|:)(?:unix:((?:[^,]|,,)+)|(?:file|pipe):(.+))"
_READ_ONLY = ("readonly", "read-only")
_WHOLE = ("pidfile", "D")  # options whose value is a file name
# Options with a property that names a file to write, and the key that the first may omit.
_NAMING = {
    "chardev": ("logfile", "backend"),
    "trace": ("file", "enable"),
    "audiodev": ("path", "driver"),
    "machine": ("dumpdtb", "type"),
}
_CHARDEVS = ("file", "pipe", "serial", "tty", "parallel", "parport")
# Block drivers of remote images, and the properties that locate them.
_REMOTE = ("nbd", "ssh", "rbd", "iscsi", "gluster", "nfs", "sheepdog", "nvme")
_PLACE = (
    "server",
    "host",
    "port",
    "path",
    "socket",
    "export",
    "name",
    "volume",
    "pool",
    "image",
    "namespace",
    "portal",
    "target",
    "lun",
    "device",
)


def written_files(command: CommandLine) -> dict[str, Option]:
    """Return the real paths (or descriptions of remote images), and the option that names each."""
    command = with_configurations(command)
    return _by_real_path(command, (*_disks(command), *_nodes(command), *_others(command)))


def written_images(command: CommandLine) -> dict[str, Option]:
    """Return the same as :func:`written_files`, for disks only."""
    command = with_configurations(command)
    return _by_real_path(command, (*_disks(command), *_nodes(command)))


def _by_real_path(command: CommandLine, names: Iterable[tuple[str, Option]]) -> dict[str, Option]:
    options: dict[str, Option] = {}
    for name, option in names:
        is_path = "://" not in name and not name.startswith(_REMOTE) and "json:" not in name
        # Relative to QEMU's working directory.
        real = os.path.realpath(Path(command.directory or "", name)) if is_path else name
        if real != os.devnull:
            options[real] = option
    return options


def _disks(command: CommandLine) -> Iterator[tuple[str, Option]]:
    if command.has("snapshot"):  # all writes go to temporary files
        return
    for option in command.options:
        if option.name in _IMAGES:
            for name in _image(option.value or ""):
                yield name, option
        if option.name != "drive":
            continue
        properties = option.properties()
        if properties.get("media") == "cdrom" or is_on(properties.get("snapshot")):
            continue
        if properties.get("file", "").startswith("json:"):
            properties["file"] = _whole_json(option.value or "")
        if not _read_only(properties):
            for name in _places(_nested(properties), file_is_name=True):
                yield name, option


def _nodes(command: CommandLine) -> Iterator[tuple[str, Option]]:
    """Yield the images of ``-blockdev`` nodes, unless all nodes above only read."""
    nodes = [(option, option.properties("driver")) for option in command.all("blockdev")]

    def is_written(number: int) -> bool:
        properties = nodes[number][1]
        name = properties.get("node-name")
        # A node can only be used by a later one.
        above = [
            (later, key)
            for later in range(number + 1, len(nodes))
            for key, value in nodes[later][1].items()
            if value == name and key != "node-name"
        ]
        writers = (is_written(later) for later, key in above if "backing" not in key.split("."))
        return not _read_only(properties) and (not above or any(writers))

    for number, (option, properties) in enumerate(nodes):
        if is_written(number):
            for name in _places(_nested(properties)):
                yield name, option


def _places(node: Mapping[str, Any], *, file_is_name: bool = False) -> Iterator[str]:
    """Yield the places of a node's data: names of files, or descriptions of servers.

    ``file_is_name``: in ``-drive``, ``file`` names a file instead of a node.
    """
    if _read_only(node):
        return
    filename = node.get("filename", node.get("file") if file_is_name else None)
    if isinstance(filename, str):
        yield from _image(filename)
    driver = node.get("driver", "")
    server = {key: node[key] for key in _PLACE if key in node}
    if driver in _REMOTE and server:
        yield f"{driver} {json.dumps(server, sort_keys=True)}"
        return
    for key, child in node.items():
        if isinstance(child, dict) and key != "backing":
            yield from _places(child)


def _image(name: str) -> Iterator[str]:
    """Yield the places that an image name refers to: a path, a URL, or a ``json:`` node."""
    if not name.startswith("json:"):
        yield name.removeprefix("file:")
        return
    try:
        node = json.loads(name.removeprefix("json:"))
        properties = dict(flatten("", node)) if isinstance(node, dict) else {}
    except (ValueError, RecursionError):  # QEMU reports it
        yield name
        return
    yield from _places(_nested(properties), file_is_name=True)


def _whole_json(text: str) -> str:
    """Return a ``json:`` name in a property list, whose commas may not be doubled."""
    _, _, rest = text.partition("file=json:")
    for candidate in (rest, rest.replace(",,", ",")):
        try:
            _, end = json.JSONDecoder().raw_decode(candidate)
        except (ValueError, RecursionError):
            continue
        return f"json:{candidate[:end]}"
    return f"json:{rest}"


def _nested(properties: Mapping[str, str]) -> dict[str, Any]:
    """Return ``{"file.filename": "/d"}`` as ``{"file": {"filename": "/d"}}``."""
    tree: dict[str, Any] = {}
    for key, value in properties.items():
        *front, last = key.split(".")
        node = tree
        for part in front:
            inner = node.get(part)
            if not isinstance(inner, dict):
                inner = node[part] = {}
            node = inner
        node.setdefault(last, value)
    return tree


def _others(command: CommandLine) -> Iterator[tuple[str, Option]]:
    for option in command.options:
        value = option.value or ""
        if option.name in _STREAMS and (named := re.search(_STREAM, value)):
            yield named[1].replace(",,", ",") if named[1] else named[2], option
        if option.name in _WHOLE:
            yield value, option
        if option.name in _NAMING:
            key, implied = _NAMING[option.name]
            properties = option.properties(implied)
            if key in properties:
                yield properties[key], option
        if option.name == "chardev":
            properties = option.properties("backend")
            makes_it = properties.get("backend") in _CHARDEVS or is_on(properties.get("server"))
            if makes_it and "path" in properties:
                yield properties["path"], option
        if option.name == "object":
            properties = option.properties("qom-type")
            if properties.get("qom-type") == "filter-dump" and "file" in properties:
                yield properties["file"], option
            path = properties.get("mem-path")
            shared = is_on(properties.get("share")) and not is_on(properties.get("readonly"))
            # In a directory, QEMU makes a private file.
            if shared and path is not None and not Path(path).is_dir():
                yield path, option


def _read_only(properties: Mapping[str, Any]) -> bool:
    return any(is_on(properties.get(key)) for key in _READ_ONLY)
