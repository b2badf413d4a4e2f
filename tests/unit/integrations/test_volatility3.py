"""volatility's layers on snapshots, without a Linux in them; tests/qemu/test_analysis_tools.py has one."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import RamBlock, convert, save
from tests.harness.snapshots import ram

pytest.importorskip(
    "volatility3.framework"
)  # a wheel of this package leaves a folder "volatility3"
from volatility3.framework import contexts
from volatility3.framework.layers import physical

from pyqmigrate.integrations import volatility3 as integration

MEMORY = ram(900, seed=1).tobytes()


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("s") / "guest 1.mapped"  # a URL has %20 there
    save(path, [RamBlock("pc.ram", MEMORY)], machine="pc-q35-10.0")
    return path


def file_layer(context: Any, location: str) -> Any:
    context.config["file.location"] = location
    layer = physical.FileLayer(context, "file", "file")
    context.add_layer(layer)
    return layer


def stacked(path: Path) -> Any:
    context = contexts.Context()
    file_layer(context, path.as_uri())
    return integration.SnapshotStacker.stack(context, "file")


def test_layer_of_a_snapshot_has_the_bytes_of_its_core(snapshot: Path) -> None:
    convert(snapshot, snapshot.with_name("elf"), to="elf")
    core = snapshot.with_name("elf").read_bytes()
    layer = stacked(snapshot)
    assert layer.maximum_address == len(core) - 1
    assert layer.read(0, len(core)) == core


def test_layer_is_copied_along_with_its_context(snapshot: Path) -> None:
    layer = stacked(snapshot)
    assert layer.read(0, 4) == b"\x7fELF"
    assert copy.deepcopy(layer).read(0, 4) == b"\x7fELF"


@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF" + bytes(60), bytes(5000)])
def test_nothing_is_stacked_on_another_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    context = contexts.Context()
    context.config["file.location"] = (tmp_path / "f").as_uri()
    layer = physical.FileLayer(context, "file", "file")
    context.add_layer(layer)
    assert integration.SnapshotStacker.stack(context, "file") is None
    layer.destroy()


def test_snapshot_that_cannot_be_placed_is_explained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "s", [RamBlock("ram", MEMORY)], machine="unheard-of")
    assert stacked(tmp_path / "s") is None
    assert "unheard-of" in caplog.text


def test_url_opens_the_core(snapshot: Path) -> None:
    layer = file_layer(contexts.Context(), f"pyqmigrate:{snapshot}")
    assert layer.read(0, 4) == b"\x7fELF"


def test_file_is_read_and_sought_like_any_other(snapshot: Path) -> None:
    with integration.SnapshotHandler.default_open(
        integration.urllib.request.Request(f"pyqmigrate:{snapshot}")
    ) as file:
        assert file.readable() and file.seekable()
        assert file.read(4) == b"\x7fELF"
        assert file.tell() == 4
        size = file.seek(0, io.SEEK_END)
        assert file.read(10) == b""
        assert file.seek(-10, io.SEEK_CUR) == size - 10
        assert len(file.read(100)) == 10


def test_plugin_directory_has_the_module_that_volatility_imports() -> None:
    [plugin] = integration.plugin_directory().glob("*.py")
    assert "import pyqmigrate.integrations.volatility3" in plugin.read_text()
