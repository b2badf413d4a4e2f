"""Adapt a recorded command line to a new QEMU.

The saved QEMU had inherited descriptors, monitors and start options that the new one does not have,
and perhaps disks that it got later.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.qemu.command_line import CommandLine, Option, is_on, is_qemu
from pyqmigrate.vm.qemu.disk_options import with_image
from pyqmigrate.vm.qemu.spawn import OWN_CONFIGURATION, QMP_CHARDEV
from pyqmigrate.vm.record.contents import VmRecord
from pyqmigrate.vm.record.disk_check import is_path, pair_disks

__all__ = ["original_command", "recorded_command", "without_monitors"]

_GIVE = "give the whole command line after --"
# Options about how the old QEMU was started, or what it loaded.
_LEFT_OUT = ("S", "incoming", "loadvm", "daemonize", "pidfile")
_DESCRIPTOR = re.compile(
    r"(?:^|[,.=])(?:fd|fds|vhostfd|vhostfds)=\w|/dev/fd/\d|/proc/(?:self|\d+)/fd/|/dev/fdset/"
)
_DESCRIPTOR_KEYS = {"fd", "fds", "vhostfd", "vhostfds"}
_NEVER_WORDS = ("append", "name", "smbios", "fw_cfg", "uuid")  # free text
# Properties of backends with a file.
_OF_FILES = ("mem-path", "offset", "readonly", "rom", "align", "discard-data", "pmem")
_OWN = re.compile(r"/proc/self/fd/\d+")


def recorded_command(record: VmRecord, path: Path) -> tuple[CommandLine, list[str]]:
    """Return the command line of ``record``, read from ``path``, and notes on changes to it.

    Raises UsageError if there is none, if it cannot be reused, or if another user may have written
    the file: the command line runs with the caller's rights.
    """
    command = original_command(record, path)
    words = record.command or ()
    for number in record.qemu.redacted:
        said = " ".join(words[max(number - 1, 0) : number + 1])
        raise UsageError(f"a secret was removed from the recorded command line ({said}): {_GIVE}")
    notes = []
    command = _without_own_monitors(command)
    for option in command.options:
        if option.name in ("pidfile", "daemonize"):
            notes.append(f"{option} is left out")
    command = command.without(*_LEFT_OUT)
    command, changed = _with_new_memory(command)
    _refuse_descriptors(command)
    command = _with_present_disks(command, record)
    return command, [*notes, *changed]


def original_command(record: VmRecord, path: Path) -> CommandLine:
    """Return the command line of ``record`` unchanged, with the path of its program.

    Its files and descriptors may be in use, or gone. Raises UsageError if there is none, or if
    another user may have written the file.
    """
    words = record.command
    if words is None:
        raise UsageError(f"the record {os.fspath(path)!r} has no command line: {_GIVE}")
    _check_owner(path)
    command = _with_program(CommandLine.parse(words), record)
    return command._replace(directory=_directory(record))


def _check_owner(path: Path) -> None:
    info = path.stat()
    if info.st_uid not in (0, os.geteuid()) or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(
            f"the record {os.fspath(path)!r} may have been written by another user, so its command "
            f"line is not run: {_GIVE}, or make the file yours (chown, chmod go-w) when you know it"
        )


def _with_program(command: CommandLine, record: VmRecord) -> CommandLine:
    """Use the program's path, because PATH may differ here."""
    binary = record.qemu.binary.removesuffix(" (deleted)")
    if not is_qemu(command.program):
        raise UsageError(
            f"the recorded command line starts {command.program!r}, which does not look like a "
            f"QEMU: {_GIVE}"
        )
    if command.before or not is_qemu(binary):  # a loader, a wrapper: unchanged
        return command
    if not os.access(binary, os.X_OK):
        raise UsageError(f"the recorded program {binary!r} cannot be run here: {_GIVE}")
    return command._replace(program=binary)


def _directory(record: VmRecord) -> str | None:
    """Return the directory that relative names of the command line start from."""
    directory = record.qemu.directory
    if directory is not None and not os.path.isdir(directory):  # a name too long
        raise UsageError(
            f"the working directory {directory!r} of the recorded command line does not exist: "
            f"{_GIVE}"
        )
    return directory


def _without_own_monitors(command: CommandLine) -> CommandLine:
    """Remove the options that a restore by this package added for its monitors."""
    options = [
        option for option in command.options if not _is_configuration(option, OWN_CONFIGURATION)
    ]
    is_old = len(options) == len(command.options)
    if options and f"id={QMP_CHARDEV}," in (options[-1].value or ""):
        options.pop()
    # Earlier versions added their configuration in another form, at the end.
    if is_old and options and _is_configuration(options[-1], _OWN):
        options.pop()
    return command._replace(options=tuple(options))


def _is_configuration(option: Option, pattern: str | re.Pattern[str]) -> bool:
    return option.name == "readconfig" and re.fullmatch(pattern, option.value or "") is not None


def without_monitors(command: CommandLine) -> tuple[CommandLine, list[str]]:
    """Remove its monitors, whose addresses only one guest can use; return notes, too."""
    monitors = [
        option
        for option in command.options
        if option.name in ("qmp", "qmp-pretty", "mon")
        or (option.name == "monitor" and option.value != "none")
        or (
            option.name == "object"
            and option.properties("qom-type").get("qom-type", "").startswith("monitor-")
        )
    ]
    if not monitors:
        return command, []
    rest = [option for option in command.options if option not in monitors]
    used = {option.properties("chardev").get("chardev") for option in monitors}
    left_out = [
        *monitors,
        *(
            option
            for option in rest
            if option.name == "chardev"
            and (name := option.properties("backend").get("id")) in used
            and not any(_uses(other, name or "") for other in rest if other is not option)
        ),
    ]
    options = [option for option in command.options if option not in left_out]
    # Without this, QEMU would make one at its standard input.
    if not any(option.name == "monitor" for option in options):
        options.append(Option("monitor", "none"))
    return command._replace(options=tuple(options)), [
        f"{option} is left out: each guest gets its own monitor" for option in left_out
    ]


def _uses(option: Option, chardev: str) -> bool:
    named = rf'chardev"?\s*[=:]\s*"?{re.escape(chardev)}(?:[,"]|$)'
    return re.search(named, option.value or "") is not None


def _with_new_memory(command: CommandLine) -> tuple[CommandLine, list[str]]:
    """Replace memory in a file that only a descriptor named by memory without a file, of the same
    kind."""
    changes, notes = {}, []
    for option in command.all("object"):
        properties = option.properties("qom-type")
        if properties.get("qom-type") != "memory-backend-file" or not _OWN.match(
            properties.get("mem-path", "")
        ):
            continue
        kind = "memory-backend-memfd" if is_on(properties.get("share")) else "memory-backend-ram"
        changes[option] = Option("object", _of_other_type(option.value or "", kind), option.word)
        notes.append(
            f"memory {properties.get('id')!r} was in a file that only QEMU had open: it gets new "
            "memory"
        )
    return command.replaced(changes), notes


def _of_other_type(value: str, kind: str) -> str:
    """Return the value of ``-object`` for a backend without a file."""
    if value.lstrip().startswith("{"):
        kept = {k: v for k, v in json.loads(value).items() if k not in _OF_FILES}
        return json.dumps(kept | {"qom-type": kind})
    items = re.findall(r"(?:[^,]|,,)+", value)
    kept_items = [
        item for item in items[1:] if item.partition("=")[0] not in (*_OF_FILES, "qom-type")
    ]
    return ",".join([kind, *kept_items])


def _refuse_descriptors(command: CommandLine) -> None:
    """Raise UsageError for inherited descriptors, which ended with their process."""
    for option in command.options:
        if option.name in _NEVER_WORDS or option.value is None:
            continue
        if (
            option.name == "add-fd"
            or _DESCRIPTOR.search(option.value)
            or any(_names_descriptor(option))
        ):
            raise UsageError(
                f"the recorded command line uses a descriptor that QEMU inherited ({option}): "
                f"{_GIVE}"
            )


def _names_descriptor(option: Option) -> Iterator[bool]:
    if (option.value or "").lstrip().startswith("{"):
        properties = option.properties()
        for key in properties:
            front, _, last = key.rpartition(".")
            yield last in _DESCRIPTOR_KEYS
            yield last == "str" and properties.get(f"{front}.type") == "fd"


def _with_present_disks(command: CommandLine, record: VmRecord) -> CommandLine:
    """Use the current file of each disk, which may be an overlay of an earlier save.

    Files that no longer exist (-snapshot) are left to the comparison of the disks.
    """
    for disk, option in pair_disks(command, record):
        if option is None or option.file is None or not is_path(disk.file):
            continue
        file = os.path.join(command.directory or "", option.file)
        if os.path.normpath(file) != disk.file and os.path.lexists(disk.file):
            command = with_image(command, option, disk.file, disk.format)
    return command
