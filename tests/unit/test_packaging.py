"""The package as it is built: one version, one ABI where there is one, errors that help."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import pyqmigrate
from tests.harness.covering import covering

ROOT = Path(__file__).parents[2]


def build(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py ARGUMENTS`` in a copy of what the core is built from."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pyqmigrate", tmp_path / "pyqmigrate", ignore=ignore)
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, **environment},
    )


def test_version_has_one_source() -> None:
    assert pyqmigrate.__version__ == importlib.metadata.version("pyqmigrate")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert "version" not in project


def test_command_prints_the_version() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pyqmigrate", "--version"], capture_output=True, text=True
    )
    assert ran.stdout == f"pyqmigrate {pyqmigrate.__version__}\n"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_build_without_a_compiler_says_what_to_install(tmp_path: Path, compiler: str) -> None:
    ran = build(tmp_path, "build_ext", CC=compiler)
    assert ran.returncode != 0
    if compiler != "false":
        assert f"Missing: the C compiler ({compiler})" in ran.stderr
    for word in ("C compiler", "apt install gcc", "dnf install gcc", "python3-dev"):
        assert word in ran.stderr


def test_build_without_headers_names_them(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sysconfig\n"
        "real = sysconfig.get_paths\n"
        "sysconfig.get_paths = lambda *a, **k: real(*a, **k) | {'include': '/no/headers'}\n"
    )
    ran = build(tmp_path, "build_ext", CC="false", PYTHONPATH=str(tmp_path / "site"))
    assert "Missing: Python's headers (/no/headers/Python.h)" in ran.stderr


@pytest.fixture(params=covering(["made up", "real"], short=["made up"]))
def compiler(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of a build: with a C compiler, or with one that only makes empty files.

    A core is compiled for some ten seconds, and an environment of the tests has one anyway.
    """
    if request.param == "real":
        return {"CFLAGS": "-O0"}
    program = tmp_path / "cc"
    program.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    program.chmod(0o755)
    return {"CC": str(program)}


def test_python_without_a_gil_gets_a_core_of_its_own(
    tmp_path: Path, compiler: dict[str, str]
) -> None:
    """What the build does where ``Py_GIL_DISABLED`` is set."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sysconfig\nsysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1\n"
    )
    site = str(tmp_path / "site")
    ran = build(tmp_path, "-q", "bdist_wheel", PYTHONPATH=site, **compiler)
    assert ran.returncode == 0, ran.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    assert "abi3" not in wheel.name
    [core] = (tmp_path / "build").rglob("_core*.so")
    assert core.name.startswith("_core.cpython-")


def test_core_needs_no_new_c_library() -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    check = runpy.run_path(str(ROOT / ".ci" / "check-dist"))
    core = pyqmigrate.__path__[0]
    [library] = Path(core).glob("_core*.so")
    assert check["too_new"](str(library)) == []


def test_wheels_are_built_for_both_architectures() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert settings["linux"]["archs"] == ["x86_64", "aarch64"]
    for architecture in ("x86_64", "aarch64"):
        assert settings[f"manylinux-{architecture}-image"] == "manylinux_2_28"


def test_install_lines_of_the_pages_name_this_tree() -> None:
    """The package is not in an index: nothing may tell people to fetch it from one."""
    sources = (ROOT / "pyqmigrate").rglob("*.py")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *sources]
    wrong = [
        f"{page.name}: {line.strip()}"
        for page in pages
        for line in page.read_text().splitlines()
        if re.search(r"pip install[^|]*['\" ]pyqmigrate", line)
    ]
    assert wrong == []


def in_git() -> set[str]:
    """The files of the package that git has, which a build must take along."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout")
    listed = subprocess.check_output(["git", "ls-files", "pyqmigrate"], cwd=ROOT, text=True)
    return set(listed.splitlines())


def test_wheel_and_sdist_have_every_file_of_the_package(
    tmp_path: Path, compiler: dict[str, str]
) -> None:
    shutil.copy(ROOT / "MANIFEST.in", tmp_path)
    ran = build(tmp_path, "-q", "sdist", "bdist_wheel", **compiler)
    assert ran.returncode == 0, ran.stderr
    [sdist], [wheel] = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert in_git() - packed == set()
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    assert in_git() - installed == set()
    assert not any(name.startswith(("tests", "csrc", "docs")) for name in installed)


def test_wheel_has_a_plugin_for_volatility3(tmp_path: Path) -> None:
    ran = build(tmp_path, "-q", "build_py", "--build-lib", "out")
    assert ran.returncode == 0, ran.stderr
    plugin = "pyqmigrate_snapshots.py"
    source = ROOT / "pyqmigrate" / "integrations" / "volatility3_plugins" / plugin
    built = tmp_path / "out" / "volatility3" / "plugins" / plugin
    assert built.read_text() == source.read_text()
