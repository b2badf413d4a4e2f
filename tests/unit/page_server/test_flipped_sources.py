"""A bit that is flipped anywhere in a snapshot: no wrong page is sent, and each page that is not is named."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pyqmigrate import RamBlock, compact, save, seal
from pyqmigrate.errors import PyqmigrateError
from pyqmigrate.page_server.options import Push
from pyqmigrate.page_server.serving import ServeRequest
from pyqmigrate.store import Store, add
from tests.harness.covering import covering
from tests.harness.increment_files import save_increment
from tests.harness.lazy_destination import PAGE, Destination, Memory
from tests.harness.page_serving import Serving
from tests.harness.snapshots import Bytes, ram


@dataclass(frozen=True)
class Source:
    """``snapshot`` is served; a bit of one of ``files`` is flipped."""

    snapshot: str
    files: list[Path]
    blocks: dict[str, Bytes]


def content() -> dict[str, Bytes]:
    """Noise, so that most of a compressed file is pages."""
    blocks = {"ram": ram(2000, seed=1), "vga": ram(300, seed=2)}
    for memory in blocks.values():
        memory ^= np.random.default_rng(3).integers(0, 256, len(memory), np.uint8) * (memory > 0)
    return blocks


def saved(path: Path, blocks: dict[str, Bytes]) -> Path:
    save(path, [RamBlock(name, memory) for name, memory in blocks.items()])
    return path


def sealed(directory: Path) -> Source:
    path = saved(directory / "a", blocks := content())
    seal(path)
    return Source(str(path), [path], blocks)


def increment(directory: Path) -> Source:
    base = saved(directory / "base", blocks := content())
    later = {name: memory.copy() for name, memory in blocks.items()}
    later["ram"][: 200 * PAGE] ^= 5
    later["ram"][1500 * PAGE : 1600 * PAGE] = 0
    changed = {name: (later[name] != blocks[name]).reshape(-1, PAGE).any(axis=1) for name in blocks}
    path = directory / "increment"
    seal(base)
    save_increment(path, base, later, changed)
    seal(path)
    return Source(str(path), [base, path], later)


def compacted(directory: Path) -> Source:
    compact(sealed(directory).snapshot, directory / "compact")
    return Source(str(directory / "compact"), [directory / "compact"], content())


def stored(directory: Path) -> Source:
    source = sealed(directory)
    with Store.create(directory / "store") as store:
        add(store, source.snapshot, "a")
    packs = [path for path in (directory / "store" / "packs").rglob("*") if path.is_file()]
    assert packs
    return Source(f"{directory}/store#a", packs, source.blocks)


SOURCES: dict[str, Callable[[Path], Source]] = {
    "sealed": sealed,
    "increment": increment,
    "compact": compacted,
    "store": stored,
}


def received_of(source: Source) -> tuple[Memory, set[tuple[str, int]], Exception | None]:
    """Return what a destination gets, which pages were named, and why nothing was sent."""
    memory = Memory()
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        destination = Destination(theirs, memory).start()
        stack.callback(destination.join)
        request = ServeRequest(source.snapshot, push=Push.ALWAYS)
        serving = stack.enter_context(Serving(request, ours))
        stack.callback(destination.cut)
        try:
            serving.wait_for("loaded")
        except PyqmigrateError as error:
            return memory, set(), error
        deadline = time.monotonic() + 30
        while serving.ending is None and serving.error is None:
            serving.parent.sendall(b'{"command": "status"}\n')
            time.sleep(0.002)
            status = serving.events[-1]
            left = status["pages_left"]
            all_sent = left == status["pages_withheld"] > 0
            if all_sent and len(memory.order) == status["data_pages"] - left:
                break
            assert time.monotonic() < deadline, status
    named = {
        (str(event["block"]), page)
        for event in serving.named("damage")
        for page in range(event["page"], event["page"] + event["pages"])
        if f"block {event['block']!r}, page" in event["error"]
    }
    return memory, named, serving.error


def assert_nothing_wrong(source: Source) -> int:
    """AssertionError if a page is wrong, or missing without a message.

    Return how many are missing; -1 if nothing was sent, because the file's head is damaged.
    """
    memory, named, error = received_of(source)
    if error is not None:
        assert not memory.order
        return -1
    for name, expected in source.blocks.items():
        arrived = sorted(memory.arrived[name])
        pages, wanted = (
            np.frombuffer(content, np.uint8).reshape(-1, PAGE)[arrived]
            for content in (memory.blocks[name], expected)
        )
        assert np.array_equal(pages, wanted)
        data = np.flatnonzero(expected.reshape(-1, PAGE).any(axis=1)).tolist()
        missing = {(name, page) for page in set(data) - set(arrived)}
        assert missing <= named
        assert not (missing and memory.ended)
    return len(named)


def flip(path: Path, position: int, bit: int) -> None:
    """Flip a bit, as a disk does: the file's times remain."""
    info = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ bit]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def flip_often(source: Source, seed: int, count: int) -> int:
    """Flip bits, one at a time; return in how many cases pages were withheld."""
    rng = random.Random(seed)
    assert assert_nothing_wrong(source) == 0
    sizes = [path.stat().st_size for path in source.files]
    withheld = 0
    for _ in range(count):
        [path] = rng.choices(source.files, sizes)
        position = rng.randrange(path.stat().st_size)
        bit = 1 << rng.randrange(8)
        flip(path, position, bit)
        try:
            withheld += assert_nothing_wrong(source) > 0
        except AssertionError as error:
            raise AssertionError(f"{path.name} at {position}: {error}") from error
        finally:
            flip(path, position, bit)
    return withheld


@pytest.mark.parametrize("kind", covering(SOURCES, short=["sealed", "store"]))
def test_no_flipped_bit_is_sent(kind: str, tmp_path: Path) -> None:
    assert flip_often(SOURCES[kind](tmp_path), 1, 4) > 0


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", SOURCES)
def test_none_of_a_thousand_flipped_bits_is_sent(kind: str, tmp_path: Path) -> None:
    withheld = flip_often(SOURCES[kind](tmp_path), 2, 400)
    print(f"{kind}: pages withheld in {withheld} of 400 cases")
    assert withheld > 100
