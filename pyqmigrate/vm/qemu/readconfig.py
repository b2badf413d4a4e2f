"""Files of ``-readconfig``: options, written as sections of lines ``key = "value"``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pyqmigrate.vm.qemu.command_line import CommandLine, Option, escape

__all__ = ["with_configurations"]

# Patterns are strings, compiled when first used: a restore waits for each import.
_SECTION = r'\[\s*([\w-]+)(?:\s+"([^"]*)")?\s*\]'
_VALUE = r'([\w.-]+)\s*=\s*"([^"]*)"'
_SIZE_MAX = 1 << 20  # bytes of a file that are read


def with_configurations(command: CommandLine) -> CommandLine:
    """Return ``command`` with the options in its ``-readconfig`` files, for inspection only.

    The ``word`` of each is ``-readconfig FILE: NAME``, to show to people. Unreadable files and
    files that are not regular are skipped: reading a pipe would take its data from QEMU.
    """
    front = command.directory or ""
    return command.with_options(
        *(
            configured
            for option in command.all("readconfig")
            for configured in _options(Path(front, option.value or ""))
        )
    )


def _options(file: Path) -> Iterator[Option]:
    try:
        if not file.is_file():
            return
        with file.open("rb") as stream:
            text = stream.read(_SIZE_MAX).decode(errors="replace")
    except OSError:
        return
    name = ""
    properties: list[str] = []
    for line in (*text.splitlines(), "[end]"):
        if section := re.match(_SECTION, line.strip()):
            if name:
                yield Option(name, ",".join(properties), f"-readconfig {file}: {name}")
            name = section[1]
            properties = [f"id={escape(section[2])}"] if section[2] else []
        elif value := re.match(_VALUE, line.strip()):
            properties.append(f"{value[1]}={escape(value[2])}")
