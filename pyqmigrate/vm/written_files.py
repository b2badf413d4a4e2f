"""Which files a QEMU of a given command line writes to, and which sockets it makes.

What two guests at a time must not share. Only the command line is looked at, no image is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from pyqmigrate.vm.command_line import CommandLine, Option, is_on

__all__ = ["written_files"]

_IMAGES = ("", "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash")
_SOCKETS = ("qmp", "qmp-pretty", "monitor", "serial", "parallel", "vnc")
_UNIX = re.compile(r"(?:^|:)unix:((?:[^,]|,,)+)")
_READ_ONLY = ("readonly", "read-only")


def written_files(command: CommandLine) -> dict[str, Option]:
    """Real paths (or what stands for one), and the option that names each."""
    found: dict[str, Option] = {}
    for name, option in (*_disks(command), *_nodes(command), *_others(command)):
        is_path = "://" not in name and not name.startswith("json:")
        found[os.path.realpath(name) if is_path else name] = option
    return found


def _disks(command: CommandLine) -> Iterator[tuple[str, Option]]:
    if command.has("snapshot"):  # all writes go to temporary files
        return
    for option in command.options:
        if option.name in _IMAGES:
            yield option.value or "", option
        if option.name != "drive":
            continue
        properties = option.properties()
        file = properties.get("file") or properties.get("file.filename")
        if file is None or properties.get("media") == "cdrom":
            continue
        if not _read_only(properties) and not is_on(properties.get("snapshot")):
            yield file.removeprefix("file:"), option


def _nodes(command: CommandLine) -> Iterator[tuple[str, Option]]:
    """Files of ``-blockdev`` nodes, unless whatever is above them only reads."""
    nodes = [(option, option.properties("driver")) for option in command.all("blockdev")]

    def is_written(properties: dict[str, str]) -> bool:
        name = properties.get("node-name")
        # A node can only be used by one that comes later.
        later = nodes[[p for _, p in nodes].index(properties) + 1 :]
        above = [other for _, other in later if name in other.values()]
        writers = (is_written(o) and o.get("backing") != name for o in above)
        return not _read_only(properties) and (not above or any(writers))

    for option, properties in nodes:
        file = properties.get("filename") or properties.get("file.filename")
        if file and is_written(properties):
            yield file, option


def _others(command: CommandLine) -> Iterator[tuple[str, Option]]:
    for option in command.options:
        if option.name in _SOCKETS and (unix := _UNIX.search(option.value or "")):
            yield unix[1].replace(",,", ","), option
        if option.name == "chardev":
            properties = option.properties("backend")
            if is_on(properties.get("server")) and "path" in properties:
                yield properties["path"], option
        if option.name == "object":
            properties = option.properties("qom-type")
            shared = is_on(properties.get("share")) and not is_on(properties.get("readonly"))
            if shared and "mem-path" in properties:
                yield properties["mem-path"], option


def _read_only(properties: dict[str, str]) -> bool:
    return any(is_on(properties.get(key)) for key in _READ_ONLY)
