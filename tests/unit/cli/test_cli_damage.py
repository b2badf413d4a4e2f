"""Damage of what is stored has one exit code, 1, whichever verb meets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyqmigrate import RamBlock, compact, save, seal
from pyqmigrate.store import Store, add
from tests.harness.command import Command
from tests.harness.snapshots import ram


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def changed(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def pack(store: Path) -> Path:
    return next((store / "packs").iterdir())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a frame": lambda store: changed(pack(store), 100),
    "a footer": lambda store: changed(pack(store), -20),
    "a missing pack": lambda store: pack(store).unlink(),
    "a document": lambda store: changed(store / "snapshots" / "a.snap", 900),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_a_store_is_exit_code_1(command: Command, tmp_path: Path, damage: str) -> None:
    save(tmp_path / "guest", [RamBlock("pc.ram", ram(600, density=1.0))])
    seal(tmp_path / "guest")
    store = tmp_path / "store"
    with Store.create(store) as opened:
        add(opened, tmp_path / "guest", "a")
    DAMAGES[damage](store)
    for words in (
        ["store", "verify", store],
        ["store", "get", store, "a", tmp_path / "got"],
        ["store", "copy", store, tmp_path / "copy"],
        ["verify", f"{store}#a"],
        ["convert", f"{store}#a", tmp_path / "new", "--to", "stream"],
        ["fleet", "verify", store],
    ):
        ran = command(*words)
        assert ran.code == 1, (words, ran)
        assert "[Errno" not in ran.out + ran.err
    assert not (tmp_path / "got").exists()
    assert not (tmp_path / "new").exists()


def test_damage_of_a_compact_file_is_exit_code_1(command: Command, tmp_path: Path) -> None:
    save(tmp_path / "guest", [RamBlock("pc.ram", ram(600, density=1.0, seed=1))])
    seal(tmp_path / "guest")
    path = tmp_path / "guest.zst"
    compact(tmp_path / "guest", path)
    changed(path, path.stat().st_size // 2)
    for words in (
        ["verify", path],
        ["convert", path, tmp_path / "new", "--to", "stream"],
        ["fleet", "verify", path],
    ):
        ran = command(*words)
        assert ran.code == 1, (words, ran)
        assert "[Errno" not in ran.out + ran.err
