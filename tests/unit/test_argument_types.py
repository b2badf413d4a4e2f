"""Arguments of the wrong type are UsageErrors, in every public function, before work begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyqmigrate
from pyqmigrate import Format, RamBlock, UsageError
from pyqmigrate.api import StartSaveOptions
from tests.harness.snapshots import known_memory


class _Anything:
    def __repr__(self) -> str:  # in the names of tests, which all workers must give alike
        return "an object"


ANYTHING = _Anything()
NUMBER = (None, "2", 2.0, True, b"2", [2], ANYTHING)
OPTIONAL_NUMBER = ("2", 2.0, True, b"2", [2], ANYTHING)
TEXT = (None, 5, b"x", [], ANYTHING)
CHOICE = (None, 5, b"auto", [], ANYTHING, "nonsense")
TARGET = (None, 5, 1.5, [], ANYTHING)
CALLABLE = (5, "x", [], ANYTHING)
ORDER = (5, "middle", b"big", [], ANYTHING)
NAMES = (5, "ram", b"ram", [5], [None], ANYTHING)
WRONG: dict[str, tuple[Any, ...]] = {
    "target": TARGET,
    "snapshot": TARGET,
    "source": TARGET,
    "blocks": (
        None,
        5,
        "ram",
        [5],
        ["ram"],
        [None],
        {"ram": bytearray(4096)},
        [RamBlock("ram", 5)],
        [RamBlock(5, bytearray(4096))],
        [RamBlock("ram", bytearray(4096), "4096")],
        [RamBlock("ram", bytearray(4096), 4096, "0")],
        [RamBlock("ram", bytearray(4096), 4096, -1)],
        ANYTHING,
    ),
    "channels": NUMBER,
    "direct_io": CHOICE,
    "sparse": CHOICE,
    "machine": TEXT,
    "target_page_bits": OPTIONAL_NUMBER,
    "reuse": (None, "yes", 1, [], ANYTHING),
    "max_bandwidth": NUMBER,
    "seal": (5, b"x", [], ANYTHING, "md5"),
    "progress": CALLABLE,
    "offset": OPTIONAL_NUMBER,
    "bitmap_order": ORDER,
    "page_size": OPTIONAL_NUMBER,
    "index": (5, 1.5, [], ANYTHING),
    "base": (5, 1.5, [], ANYTHING),
    "allow_pipe": (None, "yes", 1, [], ANYTHING),
    "to": CHOICE,
    "memories": (5, "ram", [5], {"ram": 5}, {5: bytearray(4096)}, ANYTHING),
    "placements": (5, "ram@0", [5], ["ram@0"], ANYTHING),
    "byte_order": ORDER,
    "max_ram_below_4g": (*OPTIONAL_NUMBER, 0, -1, 1 << 63),
    "description": (5, "{}", [], ANYTHING),
    "like": (5, 1.5, [], ANYTHING),
    "image_format": (5, b"raw", [], ANYTHING, "gzip"),
    "algorithm": CHOICE,
    "clear": CHOICE,
    "name": (5, b"x", [], ANYTHING),
    "section_id": OPTIONAL_NUMBER,
    "text": (None, 5, b"x", [], ANYTHING),
    "devices": (None, 5, "cpu", [5], ["cpu"], ANYTHING),
    "uuid": (5, "x", b"x", [], ANYTHING),
    "guest": (5, "x", [], ANYTHING),
    "fdsets": (5, "x", [1], ANYTHING),
    "policy": CHOICE,
    "run_state": CHOICE,
    "incoming": (None, "yes", 1, [], ANYTHING),
    "autostart": (None, "yes", 1, [], ANYTHING),
    "capabilities": (5, "x", {"x": 1}, ANYTHING),
    "parameters": (5, "x", {"x": 1}, ANYTHING),
    "on_exit": CALLABLE,
    "a": TARGET,
    "b": TARGET,
    "pages": (None, "yes", 1, [], ANYTHING),
    "fields": (None, "yes", 1, [], ANYTHING),
    "seals": (None, "yes", 1, [], ANYTHING),
    "level": NUMBER,
}


def calls() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Each public function and class that opens or writes something, with what makes it work."""
    blocks = [RamBlock("ram", known_memory())]
    size = len(known_memory())
    yield "save", pyqmigrate.save, {"target": "new", "blocks": blocks}
    yield "start_save", pyqmigrate.start_save, {"target": "new", "blocks": blocks}
    yield (
        "start_load",
        pyqmigrate.start_load,
        {"target": "snapshot", "memories": {"ram": bytearray(size)}},
    )
    yield "open_snapshot", pyqmigrate.open_snapshot, {"target": "stream"}
    yield "convert", pyqmigrate.convert, {"source": "snapshot", "target": "new", "to": "stream"}
    yield "diff", pyqmigrate.diff, {"a": "snapshot", "b": "stream"}
    yield "compact", pyqmigrate.compact, {"source": "snapshot", "target": "new"}
    yield "seal", pyqmigrate.seal, {"snapshot": "snapshot"}
    yield "verify_seal", pyqmigrate.verify_seal, {"snapshot": "snapshot"}
    yield "devices", pyqmigrate.devices, {"target": "snapshot"}
    yield "provenance", pyqmigrate.provenance, {"snapshot": None}
    yield "parse_placement", pyqmigrate.parse_placement, {"text": "ram@0"}
    yield "cpu_registers", pyqmigrate.cpu_registers, {"devices": ()}
    yield "Migration", pyqmigrate.Migration, {"blocks": blocks}


# They hold values, and are checked where they are used; or they are made by other functions.
VALUES = {
    "Block",
    "Snapshot",  # calling it is calling open_snapshot
    "MappedRamSnapshot",  # open_snapshot makes them
    "SequentialSnapshot",
    "IncrementSnapshot",
    "IncrementBlock",
    "RamBlock",
    "FileMemory",
    "ProcessMemory",
    "Descriptors",
    "Job",
    "Progress",
    "SaveReport",
    "LoadReport",
    "SealReport",
    "CompactReport",
    "DiffReport",
    "BlockDiff",
    "DeviceDiff",
    "FieldDiff",
    "PageRange",
    "SealCheck",
    "MappedRamBlock",
    "ImageReport",
    "Placement",
    "Devices",
    "Device",
    "CpuRegisters",
    "Provenance",
    "Guest",
    "DeviceSection",
    "FdSets",
    "Capabilities",
    "Parameters",
    "Algorithm",
    "Format",
    "DirectIO",
    "Sparse",
    "Clear",
    "Policy",
}


def parameters_of(call: Any) -> Iterator[str]:
    """Yield the names of all parameters; those of save's options are in a TypedDict."""
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            yield from StartSaveOptions.__annotations__
        else:
            yield parameter.name


def cases() -> Iterator[Any]:
    for name, call, _ in calls():
        for parameter in parameters_of(call):
            for number, value in enumerate(WRONG[parameter]):
                yield pytest.param(name, parameter, number, id=f"{name}-{parameter}-{value!r:.30}")


def test_every_public_name_is_covered() -> None:
    errors = {
        name
        for name in pyqmigrate.__all__
        if isinstance(getattr(pyqmigrate, name), type)
        and issubclass(getattr(pyqmigrate, name), Exception)
    }
    assert {name for name, _, _ in calls()} | VALUES | errors == set(pyqmigrate.__all__)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("types")
    pyqmigrate.save(place / "snapshot", [RamBlock("ram", known_memory())])
    pyqmigrate.convert(place / "snapshot", place / "stream", to="stream")
    return place


@pytest.mark.parametrize(("name", "parameter", "number"), list(cases()))
def test_wrong_type_is_a_usage_error(
    name: str, parameter: str, number: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    [(call, arguments)] = [(call, dict(a)) for n, call, a in calls() if n == name]
    arguments[parameter] = WRONG[parameter][number]
    if parameter in ("placements", "byte_order", "max_ram_below_4g"):
        arguments["to"] = Format.ELF
    if parameter in ("like", "image_format"):
        arguments["to"] = Format.LIBVIRT
        arguments.setdefault("like", "snapshot")
    with pytest.raises(UsageError):
        made = call(**arguments)
        if isinstance(made, pyqmigrate.Job):
            made.wait()
    assert {path.name for path in place.iterdir()} == {"snapshot", "stream"}


def test_options_of_save_are_those_of_start_save() -> None:
    keywords = {
        parameter.name: parameter.annotation
        for parameter in inspect.signature(pyqmigrate.start_save).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    options = {
        name: annotation.__forward_arg__
        for name, annotation in StartSaveOptions.__annotations__.items()
    }
    assert options == keywords
