"""The human monitor commands for migration, with QEMU's layout.

The input is a line of text; the output is the text for a person, with lines that end with CRLF. A
command without output returns the empty text.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import NamedTuple

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.format.uri import parse_size
from pyqmigrate.qapi.address import parse_uri
from pyqmigrate.qapi.capabilities import CAPABILITY_NAMES
from pyqmigrate.qapi.parameters import parameters_shape
from pyqmigrate.qapi.qemu_version import QEMU_10_0, QemuVersion
from pyqmigrate.qmp.backend import MigrationBackend, TakeFd
from pyqmigrate.qmp.hmp_layouts import (
    lines,
    render_capabilities,
    render_migration,
    render_parameters,
    render_status,
)

__all__ = ["Human", "run"]


class _BadLine(Exception):
    """A line that does not fit its command; the text lacks only the hint after it."""


class Human(NamedTuple):
    """The objects that commands use. ``take_fd`` returns descriptors named with getfd; ``quit`` asks
    the server to end; ``qemu`` is the version whose layout is used."""

    migration: MigrationBackend
    take_fd: TakeFd
    quit: Callable[[], None]
    qemu: QemuVersion = QEMU_10_0


def run(line: str, human: Human) -> str:
    """Run one line and return its output.

    An error of the migration is returned as text, ``Error: ...``, and not raised.
    """
    text = line.lstrip()
    if not text:
        return ""
    word, rest = _word(text)
    table, name = _COMMANDS, word
    if word == "info":
        if not rest.strip():
            return _help_of_all(_INFO, "info ", human.qemu)
        table = _INFO
        name, rest = _word(rest.lstrip())
    said = text[: len(text) - len(rest)]
    command = table.get(_ALIASES.get(name, name) if table is _COMMANDS else name)
    if command is None:
        return lines(f"unknown command: '{said}'")
    try:
        arguments = _Arguments(command.shown, rest)
        values = [read(arguments, human.qemu) for read in command.reads]
        arguments.end()
        return command.run(human, *values)
    except _BadLine as misread:
        return lines(str(misread), f'Try "help {said}" for more information')
    except OSError as error:
        return lines(f"Error: {error.strerror or error}")
    except PyqmigrateError as error:
        return lines(f"Error: {error}")


def _word(text: str) -> tuple[str, str]:
    word = text.split(maxsplit=1)[0]
    return word, text[len(word) :]


class _Arguments:
    """Reads the rest of a line from left to right."""

    def __init__(self, command: str, text: str) -> None:
        self.command = command
        self._text = text

    def flag(self, letter: str, letters: str) -> bool:
        self._text = self._text.lstrip()
        if not self._text.startswith("-"):
            return False
        given = self._text[1:2]
        if given == letter:
            self._text = self._text[2:]
            return True
        if not given or given not in letters:
            raise _BadLine(f"{self.command}: unsupported option -{given}")
        return False

    def string(self) -> str:
        self._text = self._text.lstrip()
        quoted = _QUOTED.match(self._text)
        if quoted:
            self._text = self._text[quoted.end() :]
            return re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), quoted[1])
        if not self._text or self._text.startswith('"'):
            raise _BadLine(f"{self.command}: string expected")
        word, self._text = _word(self._text)
        return word

    def on_or_off(self) -> bool:
        word = self._text.split(maxsplit=1)[0] if self._text.strip() else ""
        if word not in ("on", "off"):
            raise _BadLine("Expected 'on' or 'off'")
        self._text = self._text.lstrip()[len(word) :]
        return word == "on"

    def rest_or_nothing(self) -> str:
        text, self._text = self._text, ""
        return text

    def rest(self) -> str:
        """Return the rest of the line unchanged, with blanks and quotes at its end."""
        text, self._text = self._text.lstrip(), ""
        if not text:
            raise _BadLine(f"{self.command}: string expected")
        return text

    def end(self) -> None:
        if self._text.strip():
            raise _BadLine(f"{self.command}: extraneous characters at the end of line")


_QUOTE_LEFT_OPEN = re.compile(
    r"""(?:[^\\"']|\\.|"(?:[^\\"]|\\.)*"|'[^']*')*(?:(")(?:[^\\"]|\\.)*|(')[^']*)""", re.DOTALL
)
_QUOTED = re.compile(r'"((?:[^"\\]|\\[nr\\\'"])*)"', re.DOTALL)


def _set_capability(human: Human, name: str, state: bool) -> str:
    if name not in CAPABILITY_NAMES or not human.qemu.has(name):
        raise UsageError(f"invalid parameter value: {name}")
    human.migration.set_capabilities({name: state})
    if human.migration.capabilities.zero_blocks:
        return lines("warning: zero-blocks capability is deprecated")
    return ""


def _set_parameter(human: Human, name: str, text: str) -> str:
    if name not in parameters_shape(human.qemu).members:
        raise UsageError(f"invalid parameter value: {name}")
    human.migration.set_parameters({name: _value(name, text)})
    return ""


def _migrate(human: Human, detach: bool, resume: bool, uri: str) -> str:
    human.migration.migrate(parse_uri(uri), resume=resume, take_fd=human.take_fd)
    if detach:
        return ""
    return lines("terminal does not allow synchronous migration, continuing detached")


def _cancel(human: Human) -> str:
    human.migration.cancel()
    return ""


def _stop(human: Human) -> str:
    human.migration.stop()
    return ""


def _cont(human: Human) -> str:
    human.migration.cont()
    return ""


def _quit(human: Human) -> str:
    human.quit()
    return ""


def _info_migrate(human: Human, everything: bool) -> str:
    return render_migration(human.migration.query(), human.qemu, everything=everything)


def _help(human: Human, line: str) -> str:
    try:
        words = shlex.split(line)
    except ValueError:  # QEMU prints it on its standard error
        return ""
    if not words:
        return _help_of_all(_COMMANDS, "", human.qemu)
    name, table, prefix = words[0], _COMMANDS, ""
    if name == "info":
        if len(words) == 1:
            return _help_of_all(_INFO, "info ", human.qemu)
        name, table, prefix = words[1], _INFO, "info "
    entry = table.get(_ALIASES.get(name, name) if table is _COMMANDS else name)
    if entry is None:
        return lines(f"unknown command: '{prefix}{name}'")
    return lines(prefix + entry.help_for(human.qemu))


def _help_of_all(table: dict[str, _Entry], prefix: str, qemu: QemuVersion) -> str:
    return lines(*(prefix + entry.help_for(qemu) for entry in table.values()))


class _Entry(NamedTuple):
    shown: str  # the name in complaints and help
    run: Callable[..., str]
    reads: tuple[Callable[[_Arguments, QemuVersion], object], ...] = ()
    help: str = ""
    newer_help: str = ""  # where info has sections

    def help_for(self, qemu: QemuVersion) -> str:
        text = self.newer_help if self.newer_help and qemu.sectioned_info else self.help
        return f"{self.shown} {text}"


def _string(arguments: _Arguments, _: QemuVersion) -> str:
    return arguments.string()


def _value_text(arguments: _Arguments, qemu: QemuVersion) -> str:
    return arguments.rest() if qemu.hmp_takes_rest_of_line else arguments.string()


def _all_flag(arguments: _Arguments, qemu: QemuVersion) -> bool:
    return qemu.sectioned_info and arguments.flag("a", "a")


_COMMANDS = {
    "cont": _Entry("cont|c", _cont, help=" -- resume emulation"),
    "help": _Entry("help|?", _help, (lambda a, _: a.rest_or_nothing(),), "[cmd] -- show the help"),
    "info": _Entry(
        "info",
        lambda human: "",  # run() looks in _INFO instead
        help="[subcommand] -- show various information about the system state",
    ),
    "migrate": _Entry(
        "migrate",
        _migrate,
        (lambda a, _: a.flag("d", "dr"), lambda a, _: a.flag("r", "dr"), _string),
        "[-d] [-r] uri -- migrate to URI (using -d to not wait for completion)\n"
        "\t\t\t -r to resume a paused postcopy migration",
    ),
    "migrate_cancel": _Entry("migrate_cancel", _cancel, help=" -- cancel the current VM migration"),
    "migrate_set_capability": _Entry(
        "migrate_set_capability",
        _set_capability,
        (_string, lambda a, _: a.on_or_off()),
        "capability state -- Enable/Disable the usage of a capability for migration",
    ),
    "migrate_set_parameter": _Entry(
        "migrate_set_parameter",
        _set_parameter,
        (_string, _value_text),
        "parameter value -- Set the parameter for migration",
    ),
    "quit": _Entry("quit|q", _quit, help=" -- quit the emulator"),
    "stop": _Entry("stop|s", _stop, help=" -- stop emulation"),
}
_ALIASES = {"?": "help", "c": "cont", "q": "quit", "s": "stop"}
_INFO = {
    "migrate": _Entry(
        "migrate",
        _info_migrate,
        (_all_flag,),
        " -- show migration status",
        "[-a] -- show migration status (-a: all, dump all status)",
    ),
    "migrate_capabilities": _Entry(
        "migrate_capabilities",
        lambda human: render_capabilities(human.migration.capabilities, human.qemu),
        (),
        " -- show current migration capabilities",
    ),
    "migrate_parameters": _Entry(
        "migrate_parameters",
        lambda human: render_parameters(human.migration.parameters, human.qemu),
        (),
        " -- show current migration parameters",
    ),
    "status": _Entry(
        "status",
        lambda human: render_status(human.migration.run_state),
        (),
        " -- show the current VM status (running|paused)",
    ),
}

_MEBIBYTES = {"max-bandwidth", "avail-switchover-bandwidth"}
_NUMBERS = {
    "cpu-throttle-increment",
    "cpu-throttle-initial",
    "max-cpu-throttle",
    "multifd-channels",
    "multifd-qatzip-level",
    "multifd-zlib-level",
    "multifd-zstd-level",
    "throttle-trigger-threshold",
    "x-checkpoint-delay",
}
_BOOLS = {"cpu-throttle-tailslow", "direct-io"}
_TEXTS = {
    "mode",
    "multifd-compression",
    "tls-authz",
    "tls-creds",
    "tls-hostname",
    "zero-page-detection",
}
_NUMBER = re.compile(r"\s*([+-]?)(?:0[xX]([0-9a-fA-F]+)|0([0-7]*)|([1-9][0-9]*))", re.ASCII)
_SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)


def _value(name: str, text: str) -> object:
    """Return the parameter's value, in its JSON form."""
    if name in _TEXTS:
        return text
    if name in _BOOLS:
        if text in ("on", "yes", "true", "y"):
            return True
        if text in ("off", "no", "false", "n"):
            return False
        raise UsageError(f"Parameter '{name}' expects 'on' or 'off'")
    if name in _NUMBERS:
        return _number(name, text)
    if name == "cpr-exec-command":
        return _command_words(text)
    if name == "block-bitmap-mapping":
        raise UsageError("The block-bitmap-mapping parameter can only be set through QMP")
    if name in _MEBIBYTES:
        return _bandwidth(text)
    try:
        return parse_size(text)
    except UsageError as refused:
        if "out of range" in str(refused):
            raise UsageError(f"Value '{text}' is out of range for parameter '{name}'") from None
        raise UsageError(
            f"Parameter '{name}' expects a non-negative number below 2^64\n{_SIZE_HINT}"
        ) from None


def _command_words(text: str) -> list[str]:
    """Split like a shell, without expansion."""
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        open_quote = _QUOTE_LEFT_OPEN.fullmatch(text)
        complaint = (
            f"before matching quote was found for {open_quote[1] or open_quote[2]}."
            if open_quote
            else "just after a “\\” character."
        )
        raise UsageError(f"Text ended {complaint} (The text was “{text}”)") from None


def _number(name: str, text: str) -> int:
    found = _NUMBER.fullmatch(text)
    if found is None or len(text) > 40:
        raise UsageError(f"Parameter '{name}' expects uint64")
    sign, hexadecimal, octal, decimal = found.groups()
    value = int(hexadecimal or octal or decimal or "0", 16 if hexadecimal else 8 if octal else 10)
    return -value if sign == "-" else value


def _bandwidth(text: str) -> int:
    """Return bytes; a number without a suffix is in mebibytes."""
    try:
        bare = re.fullmatch(r"\s*\+?(?:0[xX][0-9a-fA-F]+|[0-9]+\.?|[0-9]*\.[0-9]+)", text, re.ASCII)
        if bare is None:
            return parse_size(text)
        if "x" in text.lower():
            return parse_size(hex(int(text, 16) << 20))
        return parse_size(text + "M")
    except UsageError:
        raise UsageError(f"Invalid size {text}") from None
