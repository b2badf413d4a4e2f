"""Sphinx configuration of these pages. ``make docs`` builds them; warnings are errors."""

import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

from sphinx.ext.autodoc.mock import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

project = "pyqmigrate"
author = "the pyqmigrate authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "examples"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
html_theme = "furo"
html_title = "pyqmigrate"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
nitpicky = False


def is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a part of it is missing
        return False


# What integrations need, if it is not installed. A wheel of this package leaves a folder "volatility3".
autodoc_mock_imports = [
    name.partition(".")[0] for name in ("drgn", "volatility3.framework") if not is_installed(name)
]

# The packages whose `__all__` is the public interface. A comment in that list starts a group.
PUBLIC = {
    "pyqmigrate": "Files and memories",
    "pyqmigrate.fleet": "Many snapshots",
    "pyqmigrate.vm": "A running QEMU",
    "pyqmigrate.vm.sync": "A running QEMU, without asyncio",
    "pyqmigrate.store": "A store of snapshots",
    "pyqmigrate.analysis": "Looking into a snapshot",
    "pyqmigrate.integrations.drgn": "In drgn",
    "pyqmigrate.integrations.volatility3": "In volatility3",
}


def groups(package: str) -> list[tuple[str, list[str]]]:
    """Return the names in a package's ``__all__``, grouped by the comments above them."""
    module = sys.modules[package]
    text = re.search(r"^__all__ = \[(.*?)\]", inspect.getsource(module), re.MULTILINE | re.DOTALL)
    found: list[tuple[str, list[str]]] = [("", [])]
    for comment, name in re.findall(r'#\s*(.+)|"(\w+)"', text[1] if text else ""):
        if comment:
            found.append((comment.rstrip("."), []))
        else:
            found[-1][1].append(name)
    if sorted(name for _, names in found for name in names) != sorted(module.__all__):
        raise ValueError(f"{package}.__all__ is not a plain list of names")
    return found


def directive(kind: str, name: str) -> str:
    members = "\n   :no-members:" if kind == "automodule" else ""
    return f"```{{eval-rst}}\n.. {kind}:: {name}{members}\n```\n"


def documenter(value: object) -> str:
    if isinstance(value, type):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if callable(value) else "autodata"


def mark_parameters(
    app: object, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Turn ``channels: threads ...`` in a docstring into the field of that parameter."""
    try:
        # A metaclass may hide the parameters of a class.
        made_by = value.__init__ if isinstance(value, type) else value  # type: ignore[misc]
        parameters = set(inspect.signature(made_by).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a TypedDict has no signature
        parameters = set()
    parameters |= set(getattr(value, "__annotations__", ()))
    marked: list[str] = []
    for line in lines:
        field = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if field and set(field[1].split(", ")) <= parameters:
            if marked and marked[-1] and not marked[-1].startswith((":param", " ")):
                marked.append("")
            marked += [f":param {parameter}: {field[2]}" for parameter in field[1].split(", ")]
        else:
            if marked and marked[-1].startswith((":param", " ")) and line and line[0] != " ":
                marked.append("")
            marked.append(line)
    lines[:] = marked


def setup(app: object) -> None:
    app.connect("autodoc-process-docstring", mark_parameters)  # type: ignore[attr-defined]


def write_reference() -> None:
    """Write a page for each public package, from its docstrings."""
    folder = HERE / "reference"
    folder.mkdir(exist_ok=True)
    for package, title in PUBLIC.items():
        with mock(autodoc_mock_imports):
            module = importlib.import_module(package)
        parts = [f"# {title}: `{package}`\n", directive("automodule", package)]
        for heading, names in groups(package):
            if heading:
                parts.append(f"## {heading}\n")
            parts += [
                directive(documenter(getattr(module, name)), f"{package}.{name}") for name in names
            ]
        page = folder / f"{package}.md"
        text = "\n".join(parts)
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


write_reference()
