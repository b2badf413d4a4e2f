"""A module imports from its own room and from lower layers only."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pyqmigrate"
PAGES = ["CONTRIBUTING.md", "docs/internals/architecture.md"]

# Lowest first. Rooms of one layer do not import each other.
LAYERS = [
    {"errors", "lazy_names", "log", "_core"},
    {"enums", "argument_types"},
    {"format"},
    {"core"},
    {"io", "qapi"},
    {"snapshot"},
    {"integrity", "export", "migration"},
    {"analysis", "api", "compaction", "qmp", "vm", "store"},
    {"mount", "fleet", "page_server"},
    {"cli", "integrations"},
]
FORMER_NAMES = {"opening", "sealing", "sequential"}  # of modules, without code of their own
# Inside pyqmigrate/vm, likewise.
VM_LAYERS = [
    {"cancellation"},
    {"qemu"},
    {"guest"},
    {"record"},
    {"incoming"},
    {"pool"},
    {"twin"},
    {"plan"},
    {"outgoing"},
    {"client"},
    {"sync"},
]


def modules():
    """Each module's path, and its dotted name in parts without the package's own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts not in (("__init__",), ("__main__",)) and parts[0] not in FORMER_NAMES:
            yield path, parts


def imports(path):
    """The line and the dotted name, in parts, of each import from the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, ("(relative)",)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyqmigrate":
            names = node.module.split(".")[1:]
            yield from (
                (node.lineno, (*names, alias.name))
                for alias in node.names
                if not alias.name.startswith("__")
            )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("pyqmigrate."):
                    yield node.lineno, tuple(alias.name.split(".")[1:])


def layer(layers, room):
    return next((number for number, rooms in enumerate(layers) if room in rooms), None)


def is_upward(layers, room, imported):
    here, there = layer(layers, room), layer(layers, imported)
    return room != imported and (here is None or there is None or there >= here)


def test_every_room_has_a_layer():
    rooms = {parts[0] for _, parts in modules()}
    assert rooms - set().union(*LAYERS) == set()


def test_no_import_runs_upward():
    upward = [
        f"{path.relative_to(ROOT)}:{line} {parts[0]} -> {'.'.join(names)}"
        for path, parts in modules()
        for line, names in imports(path)
        if is_upward(LAYERS, parts[0], names[0])
    ]
    assert upward == []


def test_no_import_inside_vm_runs_upward():
    upward = [
        f"{path.relative_to(ROOT)}:{line} {parts[1]} -> {'.'.join(names)}"
        for path, parts in modules()
        if parts[0] == "vm" and parts[1] != "__init__"
        for line, names in imports(path)
        if names[0] == "vm" and len(names) > 1 and is_upward(VM_LAYERS, parts[1], names[1])
    ]
    assert upward == []


def test_only_the_binding_and_io_use_cffi():
    users = {
        f"{path.relative_to(ROOT)}:{line}"
        for path, parts in modules()
        for line, names in imports(path)
        if names[0] == "_core" and parts[0] not in ("core", "io")
    }
    assert users == set()


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_print_the_table_of_layers(page):
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / page).read_text(), re.MULTILINE)
    printed = {int(number): set(re.findall(r"`(\w+)`", rooms)) for number, rooms in rows}
    assert printed == dict(enumerate(LAYERS))
