"""A guest that checks each page it reads never sees a wrong one, however often its page server is killed."""

from __future__ import annotations

import asyncio
import random
import subprocess
from pathlib import Path

import pytest

from pyqmigrate.vm.incoming.report import RestoredVm
from pyqmigrate.vm.incoming.restore import restore
from tests.harness.compare_memory import assert_same_blocks
from tests.harness.lazy_guest import blocks_of
from tests.harness.lazy_guests import kill_server
from tests.harness.saved import memory_of
from tests.harness.walking_guest import WalkingGuest

pytestmark = pytest.mark.qemu

MIB = 1 << 20
PATIENCE = 120.0  # seconds


@pytest.fixture(scope="module")
def guest(module_disk: Path) -> WalkingGuest:
    """A guest of 48 MiB that walks over 16 MiB in a scattered order."""
    guest = WalkingGuest(module_disk, 16 * MIB, spread=16)
    guest.save()
    return guest


async def kill_often(vm: RestoredVm, rng: random.Random, kills: int) -> int:
    """Kill the page server up to ``kills`` times, each time while it sends; return how often."""
    assert vm.lazy is not None
    done = 0
    while done < kills:
        async with asyncio.timeout(PATIENCE):
            while not vm.lazy.state.ended and (
                vm.lazy.state.state != "running" or vm.lazy.state.restarts < done
            ):
                await vm.lazy.changed()
        await asyncio.sleep(rng.random() * 0.03)
        if vm.lazy.state.ended or not kill_server(vm):
            break
        done += 1
    return done


async def restored_with_kills(
    guest: WalkingGuest, rng: random.Random, kills: int, *, paused: bool
) -> int:
    """Restore one guest whose page server is killed; it has all of its memory in the end.

    A guest that is not paused walks over its memory meanwhile, and must not have found a wrong page.
    """
    push = rng.choice(["idle", "always"])
    vm = await restore(
        guest.path, guest.command, mode="lazy", push=push, paused=paused, stdin=subprocess.DEVNULL
    )
    assert vm.lazy is not None
    try:
        done = await kill_often(vm, rng, kills)
        state = await asyncio.wait_for(vm.lazy.completed(), PATIENCE)
        assert state.pages_left == 0
        if paused:
            assert_same_blocks(await memory_of(vm.monitor, vm.process.pid), blocks_of(guest.path))
            await vm.monitor.execute("cont")
        await guest._walk(vm.monitor, vm.process.pid, guest.npages)
        return done
    finally:
        await vm.end()


async def killed_in_all(guest: WalkingGuest, seed: int, kills: int) -> tuple[int, int]:
    """Restore guests until servers were killed so often; return how often, and how many guests."""
    rng = random.Random(seed)
    done = guests = 0
    while done < kills:
        paused = guests % 8 == 7
        done += await restored_with_kills(guest, rng, 12, paused=paused)
        guests += 1
    return done, guests


def test_no_guest_is_lost_and_no_page_is_wrong_after_kills(guest: WalkingGuest) -> None:
    assert asyncio.run(killed_in_all(guest, 1, 20))[0] >= 20


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_no_guest_is_lost_and_no_page_is_wrong_after_a_thousand_kills(guest: WalkingGuest) -> None:
    done, guests = asyncio.run(killed_in_all(guest, 2, 1000))
    print(f"{done} kills, {guests} guests")
    assert done >= 1000
