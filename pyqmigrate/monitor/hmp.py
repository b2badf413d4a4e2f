"""The few human monitor commands that concern migration, with QEMU's layout.

A line of text in, the text that a person would see out, its lines ending CRLF. Success of a
command that shows nothing is the empty text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.format.address import parse_uri
from pyqmigrate.format.uri import parse_size
from pyqmigrate.monitor.backend import MigrationBackend, TakeFd
from pyqmigrate.options import CAPABILITY_NAMES, Capabilities, Parameters
from pyqmigrate.options.parameters import PARAMETERS
from pyqmigrate.status import MigrationInfo, RunState, Status

__all__ = ["render_capabilities", "render_migration", "render_parameters", "render_status", "run"]


class _Misread(Exception):
    """A line that does not fit its command; the text is complete but for the hint after it."""


class _Human(NamedTuple):
    migration: MigrationBackend
    take_fd: TakeFd
    quit: Callable[[], None]


def run(line: str, migration: MigrationBackend, take_fd: TakeFd, quit: Callable[[], None]) -> str:
    """Carry out one line and return what it shows.

    An error of the migration is part of the text, as ``Error: ...``; nothing is raised for it.
    ``take_fd`` gives up descriptors named with getfd; ``quit`` asks the server to end.
    """
    text = line.lstrip()
    if not text:
        return ""
    word, rest = _word(text)
    table, name = _COMMANDS, word
    if word == "info":
        if not rest.strip():
            return _lines(*(f"info {each}  -- {entry.help}" for each, entry in _INFO.items()))
        table = _INFO
        name, rest = _word(rest.lstrip())
    said = text[: len(text) - len(rest)]
    command = table.get(_ALIASES.get(name, name) if table is _COMMANDS else name)
    if command is None:
        return _lines(f"unknown command: '{said}'")
    try:
        arguments = _Arguments(command.shown, rest)
        values = [read(arguments) for read in command.reads]
        arguments.end()
        return command.run(_Human(migration, take_fd, quit), *values)
    except _Misread as misread:
        return _lines(str(misread), f'Try "help {said}" for more information')
    except OSError as error:
        return _lines(f"Error: {error.strerror or error}")
    except PyqmigrateError as error:
        return _lines(f"Error: {error}")


def _word(text: str) -> tuple[str, str]:
    word = text.split(maxsplit=1)[0]
    return word, text[len(word) :]


def _lines(*lines: str) -> str:
    return "".join(line.replace("\n", "\r\n") + "\r\n" for line in lines)


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
            raise _Misread(f"{self.command}: unsupported option -{given}")
        return False

    def string(self) -> str:
        self._text = self._text.lstrip()
        quoted = _QUOTED.match(self._text)
        if quoted:
            self._text = self._text[quoted.end() :]
            return re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), quoted[1])
        if not self._text or self._text.startswith('"'):
            raise _Misread(f"{self.command}: string expected")
        word, self._text = _word(self._text)
        return word

    def on_or_off(self) -> bool:
        word = self._text.split(maxsplit=1)[0] if self._text.strip() else ""
        if word not in ("on", "off"):
            raise _Misread("Expected 'on' or 'off'")
        self._text = self._text.lstrip()[len(word) :]
        return word == "on"

    def end(self) -> None:
        if self._text.strip():
            raise _Misread(f"{self.command}: extraneous characters at the end of line")


_QUOTED = re.compile(r'"((?:[^"\\]|\\[nr\\\'"])*)"', re.DOTALL)


def _set_capability(human: _Human, name: str, state: bool) -> str:
    if name not in CAPABILITY_NAMES:
        raise UsageError(f"invalid parameter value: {name}")
    human.migration.set_capabilities({name: state})
    return ""


def _set_parameter(human: _Human, name: str, text: str) -> str:
    if name not in PARAMETERS.members:
        raise UsageError(f"invalid parameter value: {name}")
    human.migration.set_parameters({name: _value(name, text)})
    return ""


def _migrate(human: _Human, detach: bool, resume: bool, uri: str) -> str:
    human.migration.migrate(parse_uri(uri), resume=resume, take_fd=human.take_fd)
    if detach:
        return ""
    return _lines("terminal does not allow synchronous migration, continuing detached")


def _cancel(human: _Human) -> str:
    human.migration.cancel()
    return ""


def _stop(human: _Human) -> str:
    human.migration.stop()
    return ""


def _cont(human: _Human) -> str:
    human.migration.cont()
    return ""


def _quit(human: _Human) -> str:
    human.quit()
    return ""


class _Entry(NamedTuple):
    shown: str  # the name in complaints
    run: Callable[..., str]
    reads: tuple[Callable[[_Arguments], object], ...] = ()
    help: str = ""


_COMMANDS = {
    "cont": _Entry("cont|c", _cont),
    "migrate": _Entry(
        "migrate",
        _migrate,
        (lambda a: a.flag("d", "dr"), lambda a: a.flag("r", "dr"), _Arguments.string),
    ),
    "migrate_cancel": _Entry("migrate_cancel", _cancel),
    "migrate_set_capability": _Entry(
        "migrate_set_capability", _set_capability, (_Arguments.string, _Arguments.on_or_off)
    ),
    "migrate_set_parameter": _Entry(
        "migrate_set_parameter", _set_parameter, (_Arguments.string, _Arguments.string)
    ),
    "quit": _Entry("quit|q", _quit),
    "stop": _Entry("stop|s", _stop),
}
_ALIASES = {"c": "cont", "q": "quit", "s": "stop"}
_INFO = {
    "migrate": _Entry(
        "migrate", lambda human: render_migration(human.migration.query()), (),
        "show migration status",
    ),
    "migrate_capabilities": _Entry(
        "migrate_capabilities",
        lambda human: render_capabilities(human.migration.capabilities), (),
        "show current migration capabilities",
    ),
    "migrate_parameters": _Entry(
        "migrate_parameters",
        lambda human: render_parameters(human.migration.parameters), (),
        "show current migration parameters",
    ),
    "status": _Entry(
        "status", lambda human: render_status(human.migration.run_state), (),
        "show the current VM status (running|paused)",
    ),
}  # fmt: skip

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
    "mode", "multifd-compression", "tls-authz", "tls-creds", "tls-hostname", "zero-page-detection"
}  # fmt: skip
_NUMBER = re.compile(r"\s*([+-]?)(?:0[xX]([0-9a-fA-F]+)|0([0-7]*)|([1-9][0-9]*))", re.ASCII)
_SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)


def _value(name: str, text: str) -> object:
    """Turn a word into the parameter's value, as JSON would have it."""
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


def _number(name: str, text: str) -> int:
    found = _NUMBER.fullmatch(text)
    if found is None or len(text) > 40:
        raise UsageError(f"Parameter '{name}' expects uint64")
    sign, hexadecimal, octal, decimal = found.groups()
    value = int(hexadecimal or octal or decimal or "0", 16 if hexadecimal else 8 if octal else 10)
    return -value if sign == "-" else value


def _bandwidth(text: str) -> int:
    """Without a suffix, mebibytes."""
    try:
        bare = re.fullmatch(r"\s*\+?(?:0[xX][0-9a-fA-F]+|[0-9]+\.?|[0-9]*\.[0-9]+)", text, re.ASCII)
        if bare is None:
            return parse_size(text)
        if "x" in text.lower():
            return parse_size(hex(int(text, 16) << 20))
        return parse_size(text + "M")
    except UsageError:
        raise UsageError(f"Invalid size {text}") from None


_GLOBALS = (
    "globals:",
    "store-global-state: on",
    "only-migratable: off",
    "send-configuration: on",
    "send-section-footer: on",
    "send-switchover-start: on",
    "clear-bitmap-shift: 18",
)


def render_migration(info: MigrationInfo) -> str:
    """Return what ``info migrate`` shows."""
    lines = [*_GLOBALS]
    if info.status is Status.NONE:
        return _lines(*lines)
    error = f" ({info.error})" if info.error else ""
    lines.append(f"Migration status: {info.status}{error}")
    ram = info.ram if info.status.moving or info.status is Status.COMPLETED else None
    lines.append(f"total time: {info.total_time if ram else 0} ms")
    if ram is None:
        return _lines(*lines)
    if info.status is Status.COMPLETED:
        lines.append(f"downtime: {info.downtime} ms")
    else:
        lines.append(f"expected downtime: {info.expected_downtime} ms")
    lines += [
        f"setup: {info.setup_time} ms",
        f"transferred ram: {ram.transferred >> 10} kbytes",
        f"throughput: {ram.mbps:.2f} mbps",
        f"remaining ram: {ram.remaining >> 10} kbytes",
        f"total ram: {ram.total >> 10} kbytes",
        f"duplicate: {ram.duplicate} pages",
        f"normal: {ram.normal} pages",
        f"normal bytes: {ram.normal_bytes >> 10} kbytes",
        f"dirty sync count: {ram.dirty_sync_count}",
        f"page size: {ram.page_size >> 10} kbytes",
        f"multifd bytes: {ram.multifd_bytes >> 10} kbytes",
        f"pages-per-second: {ram.pages_per_second}",
    ]
    if ram.precopy_bytes:
        lines.append(f"precopy ram: {ram.precopy_bytes >> 10} kbytes")
    if ram.downtime_bytes:
        lines.append(f"downtime ram: {ram.downtime_bytes >> 10} kbytes")
    return _lines(*lines)


def render_capabilities(capabilities: Capabilities) -> str:
    """Return what ``info migrate_capabilities`` shows."""
    return _lines(*(f"{name}: {'on' if state else 'off'}" for name, state in capabilities))


_SHOWN_PARAMETERS = {
    "announce-initial": "{} ms",
    "announce-max": "{} ms",
    "announce-rounds": "{}",
    "announce-step": "{} ms",
    "throttle-trigger-threshold": "{}",
    "cpu-throttle-initial": "{}",
    "cpu-throttle-increment": "{}",
    "cpu-throttle-tailslow": "{}",
    "max-cpu-throttle": "{}",
    "tls-creds": "'{}'",
    "tls-hostname": "'{}'",
    "max-bandwidth": "{} bytes/second",
    "avail-switchover-bandwidth": "{} bytes/second",
    "downtime-limit": "{} ms",
    "x-checkpoint-delay": "{} ms",
    "multifd-channels": "{}",
    "multifd-compression": "{}",
    "zero-page-detection": "{}",
    "xbzrle-cache-size": "{} bytes",
    "max-postcopy-bandwidth": "{}",
    "tls-authz": "'{}'",
    "x-vcpu-dirty-limit-period": "{} ms",
    "vcpu-dirty-limit": "{} MB/s",
    "mode": "{}",
    "direct-io": "{}",
}


def render_parameters(parameters: Parameters) -> str:
    """Return what ``info migrate_parameters`` shows."""
    values = dict(parameters)
    lines = []
    for name, layout in _SHOWN_PARAMETERS.items():
        value = values[name]
        if isinstance(value, bool):
            value = "on" if value else "off"
        lines.append(f"{name}: {layout.format(value)}")
    return _lines(*lines)


def render_status(state: RunState) -> str:
    """Return what ``info status`` shows."""
    if state is RunState.RUNNING:
        return _lines("VM status: running")
    return _lines("VM status: paused" + ("" if state is RunState.PAUSED else f" ({state})"))
