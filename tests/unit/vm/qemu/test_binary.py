"""What types a QEMU executable has, read from the file."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pyqmigrate.vm.qemu.binary import has_type


def elf(path: Path, constants: bytes, *, flags: int = 2, kind: int = 1) -> Path:
    """An ELF file with one section of these bytes."""
    header = struct.pack(
        "16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 1, 0
    )
    section = struct.pack("IIQQQQIIQQ", 0, kind, flags, 0, 128, len(constants), 0, 0, 1, 0)
    path.write_bytes(header + section + constants)
    return path


def test_type_among_the_constants_is_found(tmp_path: Path) -> None:
    file = elf(tmp_path / "qemu", b"\0memory-backend-file\0monitor-qmp\0other\0")
    assert has_type(file, "monitor-qmp")
    assert not has_type(file, "monitor-hmp")
    assert not has_type(file, "monitor")


@pytest.mark.parametrize("before", [0, (1 << 18) - 5, 1 << 18, (1 << 18) + 1, 3 << 18])
def test_type_is_found_wherever_it_is(tmp_path: Path, before: int) -> None:
    assert has_type(elf(tmp_path / "q", bytes([1]) * before + b"\0monitor-qmp\0"), "monitor-qmp")


@pytest.mark.parametrize(("flags", "kind"), [(6, 1), (3, 1), (2, 8)])
def test_code_and_variables_are_not_looked_at(tmp_path: Path, flags: int, kind: int) -> None:
    assert not has_type(
        elf(tmp_path / "q", b"\0monitor-qmp\0", flags=flags, kind=kind), "monitor-qmp"
    )


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\n", b"\x7fELF\x02", b"\x7fELF\x01" + bytes(99)]
)
def test_other_files_have_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    assert not has_type(file, "monitor-qmp")
    assert not has_type(tmp_path / "none", "monitor-qmp")


def test_replaced_executable_is_looked_at_again(tmp_path: Path) -> None:
    file = elf(tmp_path / "qemu", b"\0monitor-qmp\0")
    assert has_type(file, "monitor-qmp")
    elf(tmp_path / "new", b"\0monitor-hmp\0").rename(file)
    assert not has_type(file, "monitor-qmp")


def test_unchanged_executable_is_searched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = elf(tmp_path / "qemu", b"\0monitor-qmp\0")
    assert has_type(file, "monitor-qmp")
    monkeypatch.setattr("pyqmigrate.vm.qemu.binary._find", None)
    assert has_type(file, "monitor-qmp")
