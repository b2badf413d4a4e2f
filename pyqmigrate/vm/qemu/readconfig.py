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
_MOST = 1 << 20  # bytes of a file that are looked at


def with_configurations(command: CommandLine) -> CommandLine:
    """``command`` with the options that its ``-readconfig`` files make, to be looked at only.

    Each has the word ``-readconfig FILE`` as a person has to find it. A file that is not a regular
    one is left alone, since to read a pipe is to take it from QEMU; so is one that cannot be read.
    """
    front = command.directory or ""
    return command.with_options(
        *(
            made
            for option in command.all("readconfig")
            for made in _options(Path(front, option.value or ""))
        )
    )


def _options(file: Path) -> Iterator[Option]:
    try:
        if not file.is_file():
            return
        with file.open("rb") as opened:
            text = opened.read(_MOST).decode(errors="replace")
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
