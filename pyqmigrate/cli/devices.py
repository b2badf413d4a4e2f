"""Show the state of a snapshot's devices, with the names of their fields.

SNAPSHOT is a snapshot of any kind, or a file that xen-save-devices-state wrote. NAME and --section
select devices; ``cpu`` are the processors. Bytes without a description are shown as they are.

--describe adds a description to a file without one (see vm save --describe): a QEMU of the VM's
machine, which never runs, loads the device state and writes its description. The VM's command line is
the one in the record beside the file (SNAPSHOT.vm.json), or comes after --. The VM's disks and sockets
are not opened.

JSON: ``snapshot``; ``machine`` (null: the file does not record it); ``described`` (false: the
file has no description of its devices, and they are bytes); ``opaque_tail`` (true: the last devices
are missing because they could not be separated); ``devices``, a list of ``name``, ``instance_id``,
``version_id``, ``section_id``, ``offset``, ``length``, ``body_offset``, ``body_length``,
``described``, ``explained`` (false: the description does not cover all bytes) and
``state``. A state is an object of ``name``, ``version`` (perhaps null), ``offset``, ``length``,
``fields`` and ``subsections`` (states). A field is an object of ``name``, ``type``, ``offset``,
``length``, ``index`` (its place in an array, or null), ``opaque`` (true: the meaning of the bytes
is not known) and ``value``: a number, a boolean, null for a null pointer, a string of hexadecimal digits
for bytes, a state for a struct, and lists of these. A device's offsets are absolute in the file,
those of states and fields count from its body; all are in bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.describe import HINT, add_describe, description_for
from pyqmigrate.cli.opening import add_snapshot, opened
from pyqmigrate.cli.outcome import Outcome, counted, printable
from pyqmigrate.cli.progress import shown
from pyqmigrate.cli.standard_streams import read_from
from pyqmigrate.format.device.values import Device, Field, Scalar, State, Value
from pyqmigrate.snapshot.devices import Devices, devices

__all__ = ["add_parser"]

_BYTES_SHOWN = 32
_VALUES_SHOWN = 16
_LINE = 100  # characters of an element of an array that is shown on one line


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "devices", _run, __doc__)
    add_snapshot(parser)
    parser.add_argument("name", metavar="NAME", nargs="?", help="only devices of this name")
    parser.add_argument(
        "--section", type=_section, metavar="N", default=None, help="only the section of this id"
    )
    add_describe(parser)


def _section(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _run(args: argparse.Namespace) -> Outcome:
    description = None
    if args.describe:
        with opened(args, args.snapshot) as snapshot:
            description = description_for(args, snapshot)
    source, offset = read_from(args.snapshot, args.offset)
    with shown("read through") as show:
        found = devices(
            source,
            offset=offset,
            name=args.name,
            section_id=args.section,
            page_size=args.page_size,
            index=args.index,
            description=description,
            progress=show,
        )
    data = {
        "snapshot": args.snapshot,
        "machine": found.machine,
        "described": found.described,
        "opaque_tail": found.opaque_tail,
        "devices": [_device(device) for device in found.devices],
    }
    return Outcome(data, list(_lines(found)))


def _device(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "instance_id": device.instance_id,
        "version_id": device.version_id,
        "section_id": device.section_id,
        "offset": device.offset,
        "length": device.length,
        "body_offset": device.body_offset,
        "body_length": device.body_length,
        "described": device.described,
        "explained": device.explained,
        "state": _value(device.state),
    }


def _value(value: Value) -> Any:
    if isinstance(value, State):
        return {
            "name": value.name,
            "version": value.version,
            "offset": value.offset,
            "length": value.length,
            "fields": [_field(field) for field in value.fields],
            "subsections": [_value(state) for state in value.subsections],
        }
    if isinstance(value, tuple):
        return [_value(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def _field(field: Field) -> dict[str, Any]:
    return {
        "name": field.name,
        "type": field.type,
        "offset": field.offset,
        "length": field.length,
        "index": field.index,
        "opaque": field.opaque,
        "value": _value(field.value),
    }


def _lines(found: Devices) -> Iterator[str]:
    if not (found.devices or found.opaque_tail):
        yield "no device state"
    for number, device in enumerate(found.devices):
        if number:
            yield ""
        yield (
            f"section {device.section_id}: {printable(device.name)}, instance"
            f" {device.instance_id}, version {device.version_id},"
            f" {counted(device.body_length, 'byte')} at {device.body_offset:#x}"
        )
        if not device.described:
            yield "  not described by the file"
        elif not device.explained:
            yield "  the description does not cover all of it"
        yield from _state_lines(device.state, "  ")
    if found.devices and not found.described:
        yield ""
        yield f"The file does not describe its devices; {HINT} adds a description."
    if found.opaque_tail:
        yield ""
        yield "Later devices could not be separated: the file does not describe them."


def _state_lines(state: State, indent: str) -> Iterator[str]:
    rows = [(printable(field.label) or "?", _shown_type(field), field) for field in state.fields]
    label_width = max((len(label) for label, _, _ in rows), default=0)
    kind_width = max((len(kind) for _, kind, _ in rows), default=0)
    for label, kind, field in rows:
        text = f"{indent}{label.ljust(label_width)}  {kind.ljust(kind_width)}"
        yield f"{text}  {_shown(field)}".rstrip()
        inner = indent + "  "
        if isinstance(field.value, State):
            yield from _state_lines(field.value, inner)
        elif isinstance(field.value, tuple):
            for number, element in enumerate(field.value):
                if isinstance(element, State):
                    line = _on_one_line(element)
                    yield f"{inner}[{number}]  {line or ''}".rstrip()
                    if line is None:
                        yield from _state_lines(element, inner + "  ")
    for subsection in state.subsections:
        version = "" if subsection.version is None else f", version {subsection.version}"
        yield f"{indent}subsection {printable(subsection.name)}{version}"
        yield from _state_lines(subsection, indent + "  ")


def _on_one_line(state: State) -> str | None:
    """Return an element of an array on one line, None if it is long or contains structs."""
    if state.subsections or any(isinstance(field.value, State | tuple) for field in state.fields):
        return None
    line = "  ".join(f"{printable(field.label)} {_shown(field)}" for field in state.fields)
    return line if len(line) <= _LINE else None


def _shown_type(field: Field) -> str:
    kind = printable(field.type) or "unexplained"
    return f"{kind}[{len(field.value)}]" if isinstance(field.value, tuple) else kind


def _shown(field: Field) -> str:
    value = field.value
    if isinstance(value, State):
        return ""
    if isinstance(value, tuple):
        shown = [_scalar(item) for item in value[:_VALUES_SHOWN] if not isinstance(item, State)]
        return " ".join(shown) + _more(shown and value, _VALUES_SHOWN, "values")
    return _scalar(value)


def _scalar(value: Scalar) -> str:
    if isinstance(value, bytes):
        return value[:_BYTES_SHOWN].hex(" ") + _more(value, _BYTES_SHOWN, "bytes")
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return hex(value) if value > 9 else str(value)


def _more(values: Sequence[object], shown: int, noun: str) -> str:
    return f" ... {len(values)} {noun}" if len(values) > shown else ""
