"""How large an image is for a guest, by its file."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pyqmigrate.vm.qemu.image_size import image_size


def test_raw_image_is_as_long_as_its_file(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"abc")
    assert image_size(str(tmp_path / "raw")) == 3


@pytest.mark.parametrize("version", [2, 3])
def test_qcow2_image_is_as_long_as_its_header_says(tmp_path: Path, version: int) -> None:
    head = struct.pack(">4sIQIIQ", b"QFI\xfb", version, 0, 0, 16, 5 << 30)
    (tmp_path / "image").write_bytes(head + bytes(1000))
    assert image_size(str(tmp_path / "image")) == 5 << 30


def test_what_is_not_an_image_has_no_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing", "nbd:host:1", 'json:{"driver":"null-co"}', "a\0b"):
        assert image_size(str(tmp_path / name)) is None
