"""What is not started ahead of the checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyqmigrate.vm.incoming.options import DiskOptions, Mode, RestoreOptions
from pyqmigrate.vm.incoming.qemu_ahead import start_ahead


@pytest.fixture
def snapshot(tmp_path: Path) -> str:
    (tmp_path / "snap").write_bytes(bytes(4096))
    return str(tmp_path / "snap")


@pytest.fixture
def wrapper(tmp_path: Path) -> Path:
    """A program that is named like QEMU, and leaves a mark when it is started."""
    path = tmp_path / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep 60\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("front", [[], ["nice"], ["env", "A=1"]], ids=str)
def test_a_wrapper_around_qemu(snapshot: str, wrapper: Path, front: list[str]) -> None:
    assert start_ahead(snapshot, [*front, str(wrapper), "-m", "64"], RestoreOptions()) is None
    assert not wrapper.with_name("started").exists()


def test_a_wrapper_that_is_found_on_the_path(
    snapshot: str, wrapper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    assert start_ahead(snapshot, [wrapper.name, "-m", "64"], RestoreOptions()) is None
    assert not wrapper.with_name("started").exists()


def test_a_program_that_does_not_exist(snapshot: str) -> None:
    assert start_ahead(snapshot, ["/none/qemu-system-x86_64"], RestoreOptions()) is None


@pytest.mark.parametrize(
    "options",
    [
        RestoreOptions(mode=Mode.LOAD),
        RestoreOptions(mode=Mode.LAZY),
        RestoreOptions(record=1.0),
        RestoreOptions(disks=DiskOptions(new_overlays=True)),
    ],
    ids=["load", "lazy", "record", "overlays"],
)
def test_another_kind_of_restore(
    snapshot: str, options: RestoreOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyqmigrate.vm.incoming.qemu_ahead.QemuAhead", None)
    assert start_ahead(snapshot, ["qemu-system-x86_64"], options) is None


def test_what_has_no_file_of_its_own_or_no_command_line(snapshot: str) -> None:
    assert start_ahead(f"{snapshot}#name", ["qemu-system-x86_64"], RestoreOptions()) is None
    assert start_ahead(snapshot, None, RestoreOptions()) is None
    assert start_ahead(f"{snapshot}.absent", ["qemu-system-x86_64"], RestoreOptions()) is None


def test_memory_backends(snapshot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyqmigrate.vm.incoming.qemu_ahead.QemuAhead", None)
    monkeypatch.setattr("pyqmigrate.vm.incoming.qemu_ahead._is_qemu_itself", lambda _: True)
    words = ["qemu-system-x86_64", "-object", "memory-backend-ram,id=a,size=1M"]
    assert start_ahead(snapshot, words, RestoreOptions()) is None


@pytest.mark.parametrize("words", [[], ["-m", "64"], ["qemu-system-x86_64", "-m"]], ids=str)
def test_a_command_line_that_is_refused(snapshot: str, words: list[str]) -> None:
    assert start_ahead(snapshot, words, RestoreOptions()) is None
