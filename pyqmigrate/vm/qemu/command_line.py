"""Parse and edit QEMU command lines, as far as a restore needs it.

    command = CommandLine.parse(["qemu-system-x86_64", "-M", "q35", "-m", "4G"])
    command.last("machine").properties("type")      # {"type": "q35"}
    command.with_options(Option("incoming", "defer")).argv()

An option starts with one or two dashes; any other word is a disk image. Values are lists of
``key=value`` in which commas are doubled. The first key is often omitted, and a bare ``key`` or
``nokey`` is a switch. Some options also take JSON.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Self

from pyqmigrate.errors import UsageError
from pyqmigrate.format.uri import parse_size

__all__ = [
    "CommandLine",
    "Option",
    "escape",
    "flatten",
    "is_on",
    "is_qemu",
    "join_properties",
    "read_ram_size",
]

# Options without a value. All others take the next word, even if it starts with a dash.
_SWITCHES = frozenset(
    {
        "S",
        "alt-grab",
        "async-teardown",
        "ctrl-grab",
        "curses",
        "daemonize",
        "enable-fips",
        "enable-kvm",
        "enable-sync-profile",
        "full-screen",
        "h",
        "help",
        "jitdump",
        "mem-prealloc",
        "no-acpi",
        "no-fd-bootchk",
        "no-hpet",
        "no-quit",
        "no-reboot",
        "no-shutdown",
        "no-user-config",
        "nodefaults",
        "nodefconfig",
        "nographic",
        "old-param",
        "one-insn-per-tb",
        "only-migratable",
        "perfmap",
        "portrait",
        "preconfig",
        "rtc-td-hack",
        "s",
        "sdl",
        "semihosting",
        "singlestep",
        "snapshot",
        "usb",
        "version",
        "win2k-hack",
        "xen-attach",
        "xen-domid-restrict",
    }
)
# Patterns are strings, compiled when first used: a restore waits for each import.
_QEMU = r"(^|/)qemu-(system-[^/\s]+|kvm)$"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*="
_SHOWN_MAX = 80  # characters of a value in an error
_ALIASES = {"M": "machine", "nodefconfig": "no-user-config"}

_TOPOLOGY = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")


class Option(NamedTuple):
    """One option: its name without dashes, and its value (None: it takes none).

    The name of a bare disk image is empty. ``word`` is how the name was written; options that
    differ only in that are equal.
    """

    name: str
    value: str | None = None
    word: str | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Option) and self[:2] == other[:2]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:2])

    def properties(self, implied: str | None = None) -> dict[str, str]:
        """Return the properties in the value; ``implied`` is the key that the first may omit.

        JSON values other than strings are in JSON notation, except that booleans are ``on`` and
        ``off``. Raises UsageError for JSON that is invalid or nested too deeply.
        """
        text = self.value or ""
        if text.lstrip().startswith("{"):
            return self._from_json(text)
        found: dict[str, str] = {}
        for number, item in enumerate(_split(text)):
            key, equals, value = item.partition("=")
            if equals:
                found[key] = value
            elif number == 0 and implied:
                found[implied] = item
            elif item.startswith("no") and item not in ("node", "node-name"):
                found[item[2:]] = "off"
            else:
                found[item] = "on"
        return found

    def _from_json(self, text: str) -> dict[str, str]:
        data = self._json(text)
        try:
            return dict(flatten("", data)) if isinstance(data, dict) else {}
        except RecursionError as error:
            raise self._too_deep() from error

    def _too_deep(self) -> UsageError:
        return UsageError(f"-{self.name} {_start(self.value or '')} is nested too deeply")

    def _json(self, text: str) -> object:
        try:
            return json.loads(text)
        except ValueError as error:
            raise UsageError(f"-{self.name} {_start(text)} is not JSON: {error}") from error
        except RecursionError as error:
            raise self._too_deep() from error

    def listed(self, key: str) -> list[str]:
        """Return all values of a key that can occur several times, or be a JSON list.

        :meth:`properties` has only the last of the former, and ``key.0``, ``key.1`` of the latter.
        """
        text = self.value or ""
        if text.lstrip().startswith("{"):
            found = dict(self._from_json(text))
            return [
                value
                for name, value in found.items()
                if name == key or re.fullmatch(rf"{re.escape(key)}\.\d+", name)
            ]
        items = (item.partition("=") for item in _split(text))
        return [value for name, equals, value in items if equals and name == key]

    def with_property(self, key: str, value: bool | str) -> Self:
        """Return the option with a property set, and everything else as written."""
        text = self.value or ""
        if text.lstrip().startswith("{"):
            data = self._json(text)
            assert isinstance(data, dict)  # text that starts with a brace is an object, or invalid
            try:
                return self._replace(value=json.dumps(data | {key: value}))
            except RecursionError as error:
                raise self._too_deep() from error
        if isinstance(value, bool):
            value = "on" if value else "off"
        return self._replace(value=f"{text},{key}={escape(value)}")  # the last one wins

    def words(self) -> list[str]:
        """Return the words of the command line."""
        if not self.name:
            return [self.value or ""]
        return [self.word or f"-{self.name}", *([] if self.value is None else [self.value])]

    def __str__(self) -> str:
        return " ".join(self.words())


class CommandLine(NamedTuple):
    """A program and its options, in order: later ones win.

    ``before`` are the words of a wrapper: ``numactl --membind=0 qemu-system-...``. Leading
    variables (``LC_ALL=C qemu-system-...``, as in libvirt's log) become words of ``env``.
    ``directory`` is its working directory; None is this process's own.
    """

    program: str
    options: tuple[Option, ...]
    before: tuple[str, ...] = ()
    directory: str | None = None

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self:
        """Parse ``words``; UsageError if the program, or the last option's value, is missing."""
        variables = list(itertools.takewhile(lambda word: re.match(_VARIABLE, word), words))
        if len(words) == len(variables) or words[len(variables)].startswith("-"):
            raise UsageError(
                "the command line of the VM must start with the program: qemu-system-x86_64 ..."
            )
        if variables:
            words = ["env", *words]
        options = []
        # Without a word that looks like QEMU, the first word is the program.
        first = 1 + len(variables) if variables else 0
        program = next((n for n, word in enumerate(words) if n >= first and is_qemu(word)), first)
        rest = iter(words[program + 1 :])
        for word in rest:
            if not word.startswith("-") or word == "-":
                options.append(Option("", word))
                continue
            name = word[2:] if word.startswith("--") else word[1:]
            name = _ALIASES.get(name, name)
            if name in _SWITCHES:
                options.append(Option(name, word=word))
                continue
            value = next(rest, None)
            if value is None:
                raise UsageError(
                    f"the command line of the VM ends with {word}, which needs a value"
                )
            options.append(Option(name, value, word))
        return cls(words[program], tuple(options), tuple(words[:program]))

    def argv(self) -> list[str]:
        words = (word for option in self.options for word in option.words())
        return [*self.before, self.program, *words]

    def has(self, name: str) -> bool:
        return any(option.name == name for option in self.options)

    def all(self, name: str) -> list[Option]:
        return [option for option in self.options if option.name == name]

    def last(self, name: str) -> Option | None:
        return next((option for option in reversed(self.options) if option.name == name), None)

    def merged(self, name: str, implied: str | None = None) -> dict[str, str]:
        """Return the merged properties of all options of that name, as QEMU merges ``-machine``."""
        found: dict[str, str] = {}
        for option in self.all(name):
            found |= option.properties(implied)
        return found

    def processors(self) -> int | None:
        """Return how many CPUs ``-smp`` asks for; None without it, or if it is malformed."""
        smp = self.merged("smp", "cpus")
        try:
            for name in ("cpus", "maxcpus"):
                if name in smp:
                    return int(smp[name])
            number = 1
            for level in _TOPOLOGY:
                number *= int(smp.get(level, "1"))
        except ValueError:
            return None
        return number if smp else None

    def without(self, *names: str) -> Self:
        kept = tuple(option for option in self.options if option.name not in names)
        return self._replace(options=kept)

    def replaced(self, changes: Mapping[Option, Option]) -> Self:
        """Return it with each option that is a key of ``changes`` replaced, in the same place."""
        options = tuple(changes.get(option, option) for option in self.options)
        return self._replace(options=options)

    def with_options(self, *options: Option) -> Self:
        return self._replace(options=(*self.options, *options))

    def filled_in(self, number: int) -> Self:
        """Return it with every ``{n}`` replaced by ``number``."""
        options = (
            option._replace(value=option.value and option.value.replace("{n}", str(number)))
            for option in self.options
        )
        before = tuple(word.replace("{n}", str(number)) for word in self.before)
        return self._replace(options=tuple(options), before=before)


def is_qemu(word: str) -> bool:
    """Return whether a word is a QEMU program, with or without a directory."""
    return re.search(_QEMU, word) is not None


def escape(value: str) -> str:
    """Return ``value`` as written in a property list."""
    return value.replace(",", ",,")


def join_properties(first: str, properties: Mapping[str, str]) -> str:
    """Return ``first,key=value,...`` with commas doubled; ``first`` has no key."""
    return ",".join([escape(first), *(f"{k}={escape(v)}" for k, v in properties.items())])


def is_on(value: str | None) -> bool:
    """Return whether a switch is on; None is off."""
    return value is not None and value.lower() in ("on", "yes", "true", "y")


def read_ram_size(command: CommandLine) -> int | None:
    """Return the size that ``-m`` gives, in bytes; None without it. UsageError if invalid."""
    text = command.merged("m", "size").get("size")
    if text is None:
        return None
    try:
        return parse_size(f"{text}M" if text.isdecimal() else text)
    except UsageError as error:
        raise UsageError(f"-m {text!r} is not a size") from error


def _start(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "...")


def _split(text: str) -> list[str]:
    """Split at single commas; doubled ones become one."""
    pieces = re.findall(r"(?:[^,]|,,)+", text)
    return [piece.replace(",,", ",") for piece in pieces]


def flatten(front: str, value: object) -> Iterable[tuple[str, str]]:
    """Yield ``{"a": {"b": 1}}`` as ``a.b=1``, as in property lists; ``front`` is the prefix."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(f"{front}.{key}" if front else str(key), inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from flatten(f"{front}.{number}", inner)
    elif isinstance(value, bool):
        yield front, "on" if value else "off"
    else:
        yield front, value if isinstance(value, str) else json.dumps(value)
