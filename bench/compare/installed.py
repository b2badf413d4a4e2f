"""The command as pip installs it: the finder of an editable installation adds to every start."""

from __future__ import annotations

import compileall
import shutil
import sysconfig
import venv
from pathlib import Path

import pyqmigrate

__all__ = ["installed_command"]

_SCRIPT = """#!{python}
import sys
from pyqmigrate.__main__ import main
sys.exit(main())
"""


def installed_command(directory: Path) -> Path:
    """Install a copy of the package into a virtual environment ``directory``, beside the libraries of this one, and
    return its command."""
    venv.create(directory)
    places = {"base": str(directory), "platbase": str(directory)}
    packages = Path(sysconfig.get_path("platlib", scheme="venv", vars=places))
    shutil.copytree(
        Path(pyqmigrate.__file__).parent,
        packages / "pyqmigrate",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('platlib')}\n")
    compileall.compile_dir(packages / "pyqmigrate", quiet=1)
    command = directory / "bin" / "pyqmigrate"
    command.write_text(_SCRIPT.format(python=directory / "bin" / "python"))
    command.chmod(0o755)
    return command
