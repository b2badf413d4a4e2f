"""The work for a stream with very many RAM blocks."""

from __future__ import annotations

import struct
import sys
import threading
from pathlib import Path

import pytest

from tests.harness.command import Command
from tests.harness.stream_builders import EOF, RAM_EOS, configured, described, end, start, words

PAGE = 4096


def stream(nblocks: int) -> bytes:
    entries = b"".join(b"\4%04x" % number + words(PAGE) for number in range(nblocks))
    description = described()
    return (
        configured()
        + start(1, "ram", 4, words(nblocks * PAGE | 4) + entries + RAM_EOS)
        + end(1, RAM_EOS)
        + EOF
        + struct.pack(">BI", 6, len(description))
        + description
    )


def test_info_makes_few_calls_for_each_block(tmp_path: Path, command: Command) -> None:
    def calls(nblocks: int) -> int:
        (tmp_path / "snap").write_bytes(stream(nblocks))
        count = 0

        def trace(_frame: object, event: str, _argument: object) -> None:
            nonlocal count
            count += event == "call"

        threading.setprofile(trace)
        sys.setprofile(trace)
        try:
            assert command("info", tmp_path / "snap").code == 0
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        return count

    calls(10)  # the first run imports modules
    few, many = calls(100), calls(1100)
    assert many - few < 1000 * 70


def test_bitmap_of_a_small_block_needs_no_mapping(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snap").write_bytes(stream(10))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a mapping")

    monkeypatch.setattr("pyqmigrate.io.bitmap.mmap.mmap", refuse)
    assert command("info", tmp_path / "snap").code == 0
