"""The command under test, and snapshots for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.command import Command, make_snapshot, pages


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """main(), with what it prints."""
    return Command(capsys)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot with two blocks of 9 and 6 pages, a third of each zero."""
    blocks = {"pc.ram": pages(9, 1), "vga.vram": pages(6, 2)}
    path = tmp_path / "guest.mapped"
    make_snapshot(path, blocks, machine="pc-q35-10.0")
    return path
