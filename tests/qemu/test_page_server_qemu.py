"""A real QEMU gets its memory from a page server while its guest runs."""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyqmigrate import convert, open_snapshot, seal
from pyqmigrate.page_server.options import Ending, Push
from pyqmigrate.page_server.serving import ServeRequest
from pyqmigrate.store import Store, add
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.huge_pages import HUGE_PAGE, huge_pages
from tests.harness.lazy_guest import (
    RAM,
    SavedGuest,
    ServerProcess,
    lazy_guest,
    save_guest,
    wait_for,
)
from tests.harness.machine import RAM_BLOCK
from tests.harness.page_serving import Relay, Serving
from tests.harness.pattern_guest import check_pattern
from tests.harness.saving import source

pytestmark = pytest.mark.qemu

_ENDS = ("postcopy-paused", "completed")


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> SavedGuest:
    return save_guest(module_disk)


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pyqmigrate-lazy-") as name:
        yield Path(name)


def assert_arrives(saved: SavedGuest, directory: Path, kind: str, *options: str) -> None:
    with (
        lazy_guest(saved, directory, kind) as guest,
        ServerProcess(saved.path, guest.connect(), *options) as server,
    ):
        server.wait_for("end")
        assert server.wait() == 0
        wait_for(lambda: guest.migration() == "completed", "the migration does not complete")
        assert_same_blocks(guest.read_blocks(), saved.blocks)


@pytest.mark.parametrize("kind", ["private", "memfd", "tmpfs"])
def test_every_block_arrives(saved: SavedGuest, shm: Path, kind: str) -> None:
    assert_arrives(saved, shm, kind)


def test_every_block_arrives_in_huge_pages(saved: SavedGuest, shm: Path) -> None:
    with huge_pages(RAM):
        pages = f'{{"{RAM_BLOCK[saved.machine]}": {HUGE_PAGE}}}'
        assert_arrives(saved, shm, "hugetlb", "--host-pages", pages)


@pytest.mark.parametrize("machine", ["pc", "microvm"])
def test_other_machines(machine: str, module_disk: Path, shm: Path) -> None:
    assert_arrives(save_guest(module_disk, machine), shm, "private")


@pytest.mark.parametrize("push", ["idle", "always", "never"])
def test_running_guest_finds_all_of_its_pages(saved: SavedGuest, shm: Path, push: str) -> None:
    serial = shm / "lazy.serial"
    with (
        lazy_guest(saved, shm) as guest,
        ServerProcess(saved.path, guest.connect(), "--push", push) as server,
    ):
        server.wait_for("loaded")
        guest.execute("cont")
        if push == "never":
            wait_for(lambda: serial.stat().st_size >= 2, "the guest does not run")
            server.send("push", policy="idle")
        server.wait_for("end")
        wait_for(lambda: serial.stat().st_size >= 4, "the guest does not run")
        guest.execute("stop")
        memory = guest.read_blocks()[RAM_BLOCK[saved.machine]]
        assert guest.migration() == "completed"
    assert check_pattern(memory).generation > check_pattern(pattern_of(saved)).generation


def pattern_of(saved: SavedGuest) -> bytes:
    return saved.blocks[RAM_BLOCK[saved.machine]]


def restore_with_cuts(saved: SavedGuest, directory: Path, rng: random.Random, cuts: int) -> int:
    """Restore one guest, whose source is killed or cut off up to ``cuts`` times; return how often.

    The guest runs, so that pages are asked for; it has every page right in the end.
    """
    done = 0
    with ExitStack() as stack:
        guest = stack.enter_context(lazy_guest(saved, directory))
        server = stack.enter_context(ServerProcess(saved.path, guest.connect(), "--push", "always"))
        server.wait_for("loaded")
        guest.execute("cont")
        while done < cuts:
            time.sleep(rng.random() * 0.02)
            server.kill()
            if guest.migration() == "completed":
                break
            done += 1
            wait_for(lambda: guest.migration() in _ENDS, "the guest does not pause")
            if guest.migration() == "completed":
                break  # the end had arrived, and only QEMU's answer was lost
            options = ["--resume", "--push", rng.choice(["always", "idle"])]
            server = stack.enter_context(
                ServerProcess(saved.path, guest.connect(recover=True), *options)
            )
            server.wait_for("loaded")
        if guest.migration() != "completed":
            server.wait_for("end")
        wait_for(lambda: guest.migration() == "completed", "the migration does not complete")
        guest.execute("stop")
        check_pattern(guest.read_blocks()[RAM_BLOCK[saved.machine]])
    return done


def test_killed_server_is_replaced(saved: SavedGuest, shm: Path) -> None:
    assert restore_with_cuts(saved, shm, random.Random(1), 4) > 0


def restore_through_a_relay(
    saved: SavedGuest, directory: Path, rng: random.Random, cuts: int
) -> int:
    """Restore one guest, whose connection is cut at random bytes; return how often."""
    done = 0
    with lazy_guest(saved, directory) as guest:
        resume = False
        while True:
            connection = guest.connect(recover=resume)
            left = rng.randrange(1, 8 << 20) if done < cuts else None
            ours, theirs = socket.socketpair()
            request = ServeRequest(str(saved.path), resume=resume, push=Push.ALWAYS)
            with Serving(request, ours) as serving, Relay(theirs, connection) as relay:
                loaded = serving.wait_for("loaded")
                assert loaded["resumed"] is resume
                if not resume:
                    guest.execute("cont")
                relay.cut_after(left)
                relay.join()
            if serving.ending is Ending.DONE:
                break
            done += 1
            wait_for(lambda: guest.migration() in _ENDS, "the guest does not pause")
            if guest.migration() == "completed":
                break  # the end had arrived, and only QEMU's answer was lost
            resume = True
        wait_for(lambda: guest.migration() == "completed", "the migration does not complete")
        guest.execute("stop")
        check_pattern(guest.read_blocks()[RAM_BLOCK[saved.machine]])
    return done


def test_connection_is_cut_at_any_byte(saved: SavedGuest, shm: Path) -> None:
    rng = random.Random(2)
    done = 0
    while done < 16:
        done += restore_through_a_relay(saved, shm, rng, 8)


@pytest.mark.long
def test_thousand_cuts_and_kills(saved: SavedGuest, shm: Path) -> None:
    rng = random.Random(3)
    done = 0
    while done < 1000:
        done += restore_through_a_relay(saved, shm, rng, 12)
        done += restore_with_cuts(saved, shm, rng, 4)


def test_direct_save_gives_ram_an_id_of_its_own(disk: Path) -> None:
    """slirp has section id 1, which RAM had in former direct saves."""
    extra = ("-netdev", "user,id=net0")
    with source(disk, run=False, length=RAM, extra=extra) as guest:
        guest.save(disk / "direct.mapped", engine="direct")
    with open_snapshot(disk / "direct.mapped") as snapshot:
        numbers = {s.section_id: s.name for s in snapshot.stream.sections if s.name != "ram"}
        [ram] = {s.section_id for s in snapshot.stream.sections if s.name == "ram"}
    assert numbers.get(1) == "slirp"
    assert ram not in numbers


def test_damaged_snapshot_is_replaced_by_a_good_copy(
    saved: SavedGuest, disk: Path, shm: Path
) -> None:
    good, bad = disk / "good.mapped", disk / "bad.mapped"
    shutil.copy2(saved.path, good)
    seal(good)
    shutil.copy2(good, bad)
    shutil.copy2(f"{good}.seal", f"{bad}.seal")
    with open_snapshot(good) as snapshot:
        layout = snapshot.blocks[RAM_BLOCK[saved.machine]].layout
    assert layout is not None
    offset = layout.pages_offset + (8 << 20) + 5
    with bad.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    with lazy_guest(saved, shm) as guest:
        with ServerProcess(bad, guest.connect()) as server:
            server.wait_for("loaded")
            guest.execute("cont")
            damage = server.wait_for("damage")
            assert "block 'pc.ram', page " in damage["error"]
            wait_for(lambda: server.wait_for("progress")["pages_left"] <= 256, "others wait")
            assert guest.migration() == "postcopy-active"
            server.kill()
        wait_for(lambda: guest.migration() == "postcopy-paused", "the guest does not pause")
        with ServerProcess(good, guest.connect(recover=True), "--resume") as server:
            server.wait_for("end")
        wait_for(lambda: guest.migration() == "completed", "the migration does not complete")
        guest.execute("stop")
        check_pattern(guest.read_blocks()[RAM_BLOCK[saved.machine]])


def test_snapshot_of_a_store_and_a_sequential_stream_arrive(
    saved: SavedGuest, disk: Path, shm: Path
) -> None:
    with Store.create(disk / "store") as store:
        add(store, saved.path, "a")
    convert(saved.path, disk / "stream", to="stream")
    for snapshot in (f"{disk}/store#a", disk / "stream"):
        with lazy_guest(saved, shm) as guest, ServerProcess(snapshot, guest.connect()) as server:
            server.wait_for("end")
            wait_for(lambda g=guest: g.migration() == "completed", "it does not complete")
            assert_same_blocks(guest.read_blocks(), saved.blocks)
