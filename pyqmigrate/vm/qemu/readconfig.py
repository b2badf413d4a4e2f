"""Files of ``-readconfig``: options, written as sections of lines ``key = "value"``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyqmigrate.vm.qemu.command_line import CommandLine, Option, escape

__all__ = ["as_configuration", "with_configurations"]

# Patterns are strings, compiled when first used: a restore waits for each import.
_SECTION = r'\[\s*([\w-]+)(?:\s+"([^"]*)")?\s*\]'
_VALUE = r'([\w.-]+)\s*=\s*"([^"]*)"'
_SIZE_MAX = 1 << 20  # bytes of a file that are read
# QEMU reads this much of an id or a key, and lines of up to 1023 characters.
_NAME_MAX = 63
_WRITTEN_MAX = 900
_IMPLIED = {
    "object": "qom-type",
    "machine": "type",
}  # the options that can be written, and their first keys


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


def as_configuration(options: Sequence[Option]) -> str | None:
    """Return ``options`` as the text of such a file; None for one that cannot be written there.

    Lists cannot, nor objects as ``key=value``, which QEMU parses in another way.
    """
    text = ""
    for option in options:
        is_json = (option.value or "").lstrip().startswith("{")
        if option.name not in _IMPLIED or (option.name == "object" and not is_json):
            return None
        properties = option.properties(_IMPLIED[option.name])
        name = properties.pop("id", None)
        keys, values = properties.keys(), properties.values()
        if not (all(map(_is_writable_key, keys)) and all(map(_is_writable, values))):
            return None
        if name is not None and not (_is_writable(name) and len(name) <= _NAME_MAX):
            return None
        text += f"[{option.name}]\n" if name is None else f'[{option.name} "{name}"]\n'
        text += "".join(f'  {key} = "{value}"\n' for key, value in properties.items())
    return text


def _is_writable_key(key: str) -> bool:
    return len(key) <= _NAME_MAX and re.fullmatch(r"[\w-]+", key, re.ASCII) is not None


def _is_writable(value: str) -> bool:
    """Return whether QEMU reads the value as it is written: there is no way to quote."""
    is_plain = value.isascii() and value.isprintable() and '"' not in value
    return is_plain and 0 < len(value) <= _WRITTEN_MAX
