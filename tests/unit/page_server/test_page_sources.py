"""Every kind of snapshot can be the source: the destination gets all of its data, and nothing else."""

from __future__ import annotations

import contextlib
import gzip
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from pyqmigrate import compact, convert, save, seal
from pyqmigrate.errors import NotSupported, SnapshotError, UsageError
from pyqmigrate.io.memory import RamBlock
from pyqmigrate.page_server.options import ServerOptions
from pyqmigrate.page_server.server import PageServer
from pyqmigrate.page_server.serving import ServeRequest
from pyqmigrate.page_server.sources import open_source
from pyqmigrate.snapshot.save.mapped_ram import Writer
from pyqmigrate.snapshot.save.writer import SaveOptions
from pyqmigrate.store import Store, add
from tests.harness.increment_files import save_increment
from tests.harness.lazy_destination import PAGE, Destination, Memory
from tests.harness.object_store import ObjectStore, object_store
from tests.harness.page_serving import Serving, received
from tests.harness.snapshots import Bytes, ram, save_known

__all__ = ["object_store"]


def assert_received(memory: Memory, expected: dict[str, Bytes]) -> None:
    """Every page is right, and only pages with data were sent."""
    assert memory.ended
    assert list(memory.blocks) == list(expected)
    for name, content in expected.items():
        assert bytes(memory.blocks[name]) == content.tobytes()
        data = content.reshape(-1, PAGE).any(axis=1)
        assert memory.arrived[name] == set(np.flatnonzero(data).tolist())


@pytest.fixture
def blocks() -> dict[str, Bytes]:
    return {"ram": ram(700, seed=1), "vga": ram(33, seed=2), "none": np.zeros(5 * PAGE, np.uint8)}


def written(path: Path, blocks: dict[str, Bytes], **options: object) -> Path:
    save(path, [RamBlock(n, m) for n, m in blocks.items()], **options)  # type: ignore[arg-type]
    return path


def test_mapped_ram_file(tmp_path: Path, blocks: dict[str, Bytes]) -> None:
    assert_received(received(written(tmp_path / "a", blocks)), blocks)


def test_sealed_file(tmp_path: Path, blocks: dict[str, Bytes]) -> None:
    path = written(tmp_path / "a", blocks)
    seal(path)
    assert_received(received(path), blocks)


def test_sequential_stream(tmp_path: Path, blocks: dict[str, Bytes]) -> None:
    written(tmp_path / "a", blocks)
    convert(tmp_path / "a", tmp_path / "b", to="stream")
    assert_received(received(tmp_path / "b"), blocks)


@pytest.mark.parametrize("compressed", [gzip.compress, zstandard.compress])
def test_compressed_stream(
    tmp_path: Path, blocks: dict[str, Bytes], compressed: Callable[[bytes], bytes]
) -> None:
    written(tmp_path / "a", blocks)
    convert(tmp_path / "a", tmp_path / "b", to="stream")
    (tmp_path / "c").write_bytes(compressed((tmp_path / "b").read_bytes()))
    before = set(tmp_path.iterdir())
    assert_received(received(tmp_path / "c"), blocks)
    assert set(tmp_path.iterdir()) == before


def test_compact_file(tmp_path: Path, blocks: dict[str, Bytes]) -> None:
    path = written(tmp_path / "a", blocks)
    seal(path)
    compact(path, tmp_path / "b.zst")
    assert_received(received(tmp_path / "b.zst"), blocks)


def test_sequential_stream_that_differs_from_its_seal_is_refused(
    tmp_path: Path, blocks: dict[str, Bytes]
) -> None:
    written(tmp_path / "a", blocks)
    convert(tmp_path / "a", tmp_path / "b", to="stream")
    seal(tmp_path / "b")
    with (tmp_path / "b").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(SnapshotError, match="not as it was sealed: MiB 0"):
        open_source(tmp_path / "b")


def test_increment_with_its_base(tmp_path: Path) -> None:
    base = ram(500, seed=1)
    written(tmp_path / "base", {"ram": base})
    later = base.copy()
    later[100 * PAGE : 140 * PAGE] ^= 1
    later[200 * PAGE : 201 * PAGE] = 0
    changed = (later != base).reshape(-1, PAGE).any(axis=1)
    save_increment(tmp_path / "inc", tmp_path / "base", {"ram": later}, {"ram": changed})
    memory = received(tmp_path / "inc")
    assert bytes(memory.blocks["ram"]) == later.tobytes()


@pytest.mark.parametrize("sealed", [False, True])
def test_snapshot_of_a_store(tmp_path: Path, blocks: dict[str, Bytes], sealed: bool) -> None:
    path = written(tmp_path / "a", blocks)
    if sealed:
        seal(path)
    with Store.create(tmp_path / "store") as store:
        add(store, path, "a")
    assert_received(received(f"{tmp_path}/store#a"), blocks)


def test_snapshot_of_an_object_store(
    tmp_path: Path,
    blocks: dict[str, Bytes],
    object_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = written(tmp_path / "a", blocks)
    with Store.create(object_store.url("p")) as store:
        add(store, path, "a")
    assert_received(received(f"{object_store.url('p')}#a"), blocks)


def test_damaged_page_of_a_store_is_withheld(tmp_path: Path) -> None:
    content = np.random.default_rng(6).integers(0, 256, 800 * PAGE, dtype=np.uint8)
    blocks = {"ram": content}
    path = written(tmp_path / "a", blocks)
    with Store.create(tmp_path / "store") as store:
        add(store, path, "a")
    [pack] = (tmp_path / "store" / "packs").glob("*")
    data = bytearray(pack.read_bytes())
    data[100_000] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    ours, theirs = socket.socketpair()
    memory = Memory()
    destination = Destination(theirs, memory).start()
    with Serving(ServeRequest(f"{tmp_path}/store#a"), ours) as serving:
        damage = serving.wait_for("damage")
        assert damage["error"].startswith(f"block '{damage['block']}', page {damage['page']}: ")
        assert pack.stem in damage["error"]
        serving.wait_for("progress", 2)
        destination.cut()
    destination.join()
    assert not memory.ended
    for name, page in memory.order:
        expected = blocks[name][page * PAGE : (page + 1) * PAGE].tobytes()
        assert bytes(memory.blocks[name][page * PAGE : (page + 1) * PAGE]) == expected


def test_pages_of_the_destination_are_sent_whole(tmp_path: Path) -> None:
    memory = ram(1024, density=0.002, seed=3)
    written(tmp_path / "a", {"ram": memory})
    got = received(tmp_path / "a", host_pages={"ram": 64 << 10})
    assert bytes(got.blocks["ram"]) == memory.tobytes()
    data = np.flatnonzero(memory.reshape(-1, 16 * PAGE).any(axis=1))
    assert got.order == [("ram", n * 16 + k) for n in data for k in range(16)]
    assert got.advised == (64 << 10, PAGE)


def test_parts_are_short(tmp_path: Path) -> None:
    written(tmp_path / "a", {"ram": ram(600, density=1)})
    assert max(received(tmp_path / "a").parts) <= 16


def test_block_that_the_snapshot_does_not_have_is_refused(tmp_path: Path) -> None:
    save_known(tmp_path / "a")
    with open_source(tmp_path / "a") as source, pytest.raises(UsageError, match="no block 'rom'"):
        PageServer(source, {"rom": 4096}, ServerOptions(), lambda event: None)


def test_memory_whose_pages_do_not_fit_the_block_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a", {"ram": ram(3)})
    with open_source(tmp_path / "a") as source, pytest.raises(UsageError, match="8192"):
        PageServer(source, {"ram": 8192}, ServerOptions(), lambda event: None)


def test_blocks_in_other_files_are_refused(tmp_path: Path) -> None:
    blocks = [RamBlock("ram", ram(8)), RamBlock("shared", ram(8))]
    writer = Writer(tmp_path / "a", blocks, SaveOptions(left_out=frozenset({"shared"})))
    with contextlib.closing(writer):
        writer.begin()
        writer.write_pages()
        writer.finish()
    with pytest.raises(NotSupported, match="in other files"):
        open_source(tmp_path / "a")


def test_seal_of_another_size_is_refused(tmp_path: Path) -> None:
    save_known(tmp_path / "a", seal="xxh3-128")
    with (tmp_path / "a").open("ab") as file:
        file.write(b"more")
    with pytest.raises(SnapshotError, match="not as it was sealed"):
        open_source(tmp_path / "a")
