"""A guest that keeps writing while it is saved over QMP; a real QEMU loads the instant it stopped.

The guest is a thread that fills pages with new contents and with zeros, and notes which. What it
had when it was stopped is compared with what came back, byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyqmigrate import RamBlock, open_snapshot
from pyqmigrate.migration import Guest, Migration
from pyqmigrate.qapi.parameters import Parameters
from pyqmigrate.qapi.policy import Policy
from pyqmigrate.qmp import QmpServer
from pyqmigrate.qmp.client import QmpClient
from tests.harness.compare_memory import assert_same_memory
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, Qemu

pytestmark = pytest.mark.qemu

RAM = 16 << 20
PAGE = 4096
PAGES = RAM // PAGE
W, R, D = os.O_WRONLY, os.O_RDONLY, os.O_DIRECT
MULTIFD = {"mapped-ram": True, "multifd": True}


class BusyGuest(Guest):
    """Writes 4 pages in about a millisecond, a third of them zeros, whenever it runs."""

    def __init__(self, memory: Any) -> None:
        self._pages = np.frombuffer(memory, dtype=np.uint64).reshape(-1, PAGE // 8)
        self._changed = np.zeros(len(self._pages), dtype=bool)
        self._lock = threading.Lock()
        self._running = True
        self._ended = threading.Event()
        self._random = np.random.default_rng(3)
        self.written = 0
        self.looks: list[int] = []
        self.instant = b""
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        while not self._ended.wait(0.001):
            with self._lock:
                for page in self._random.integers(len(self._pages), size=4):
                    if self._running:
                        self.written += 1
                        self._pages[page] = self.written if self.written % 3 else 0
                        self._changed[page] = True

    def stop(self) -> None:
        with self._lock:
            self._running = False
            self.instant = self._pages.tobytes()

    def cont(self) -> None:
        with self._lock:
            self._running = True

    def dirty(self) -> Mapping[str, bytes]:
        with self._lock:
            self.looks.append(int(self._changed.sum()))
            bitmap = np.packbits(self._changed, bitorder="little").tobytes()
            self._changed[:] = False
        return {"pc.ram": bitmap}

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        del self._pages


@dataclass
class Served:
    """A busy guest behind a server of its own, and a client of that server."""

    guest: BusyGuest
    migration: Migration
    client: QmpClient

    def configure(self, capabilities: dict[str, bool], **parameters: object) -> None:
        wanted = {"events": True, "mapped-ram": False, "multifd": False, **capabilities}
        states = [{"capability": name, "state": on} for name, on in wanted.items()]
        self.client.execute("migrate-set-capabilities", {"capabilities": states})
        named = {name.replace("_", "-"): value for name, value in parameters.items()}
        self.client.execute("migrate-set-parameters", named)

    def until(self, *statuses: str, limit: float = 30) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        while True:
            info: dict[str, Any] = self.client.execute("query-migrate")
            if info.get("status") in statuses:
                return info
            assert time.monotonic() < deadline, info
            time.sleep(0.002)

    def save(self, uri: str) -> dict[str, Any]:
        self.client.execute("migrate", {"uri": uri})
        info = self.until("completed", "failed", "cancelled")
        assert info["status"] == "completed", info
        assert self.client.execute("query-status")["status"] == "postmigrate"
        return info

    def events(self) -> list[str]:
        """Statuses, STOP and RESUME, and passes by number, since the last time."""
        self.client.execute("query-status")
        heard, self.client.events = self.client.events, []
        return [
            str(e.get("data", {}).get("status") or e.get("data", {}).get("pass") or e["event"])
            for e in heard
        ]


@contextlib.contextmanager
def served(machine: str, directory: Path, policy: Policy) -> Iterator[Served]:
    path, ready = directory / "qmp.sock", threading.Event()
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    with GuestRam(RAM) as ram, contextlib.ExitStack() as stack:
        fill(ram.memory, Contents.SPECKLED)
        guest = BusyGuest(ram.memory)
        stack.callback(guest.end)
        migration = Migration(
            [RamBlock("pc.ram", ram.memory)],
            guest=guest,
            machine=machine,
            policy=policy,
            parameters=Parameters(),
        )
        stack.callback(migration.close)

        async def serve() -> None:
            loops.append((asyncio.get_running_loop(), asyncio.Event()))
            async with QmpServer(migration, migration.fdsets, policy=policy) as server:
                await server.listen(path)
                ready.set()
                await loops[0][1].wait()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        stack.callback(thread.join)
        assert ready.wait(20)
        loop, ending = loops[0]
        stack.callback(loop.call_soon_threadsafe, ending.set)
        yield Served(guest, migration, stack.enter_context(QmpClient.connect(path)))


@pytest.fixture(scope="module")
def machine_type() -> str:
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        return vm.machine_name()


@pytest.fixture
def live(request: pytest.FixtureRequest, machine_type: str, tmp_path: Path) -> Iterator[Served]:
    with served(machine_type, tmp_path, getattr(request, "param", Policy.STRICT)) as found:
        yield found


@dataclass(frozen=True)
class Way:
    name: str
    capabilities: dict[str, bool]
    direct: bool = False
    lent: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name


WAYS = [
    Way("plain", {}),
    Way("mapped-ram", {"mapped-ram": True}),
    Way("multifd", MULTIFD),
    Way("multifd-direct", MULTIFD, direct=True),
    Way("multifd-fdset-direct", MULTIFD, direct=True, lent=(0, D)),
]


def lend(end: QmpClient | Qemu, way: Way, path: Path, access: int) -> str:
    for flags in way.lent:
        fd = os.open(path, access | flags | os.O_CREAT, 0o600)
        try:
            end.execute("add-fd", {"fdset-id": 1}, fd=fd)
        finally:
            os.close(fd)
    return "file:/dev/fdset/1,offset=4096" if way.lent else f"file:{path}"


def assert_qemu_loads(way: Way, path: Path, expected: bytes) -> None:
    with GuestRam(RAM) as ram, Qemu(ram, incoming=True) as vm:
        vm.set_capabilities({"events": True, "mapped-ram": False, **way.capabilities})
        vm.execute("migrate-set-parameters", {"multifd-channels": 3, "direct-io": way.direct})
        uri = lend(vm, way, path, R)
        vm.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
        assert vm.wait() == {"status": "completed"}, vm.stderr()
        assert_same_memory(ram.memory, expected)


@pytest.mark.parametrize(
    ("live", "way"),
    [
        *((Policy.STRICT, way) for way in WAYS),
        *((Policy.COMPAT, way) for way in (WAYS[0], WAYS[-1])),
    ],
    indirect=["live"],
    ids=lambda value: value.value if isinstance(value, Policy) else str(value),
)
def test_qemu_loads_the_instant_at_which_a_busy_guest_was_stopped(
    live: Served, disk: Path, way: Way
) -> None:
    path = disk / "state"
    before = live.guest.written
    live.configure(
        way.capabilities,
        multifd_channels=3,
        direct_io=way.direct,
        max_bandwidth=48 << 20,
        downtime_limit=50,
    )
    live.events()
    info = live.save(lend(live.client, way, path, W))
    passes = info["ram"]["dirty-sync-count"]
    counted = [str(number) for number in range(2, passes)]
    assert live.events() == [
        "setup",
        "1",
        "active",
        *counted,
        "STOP",
        "device",
        str(passes),
        "completed",
    ]
    assert passes >= 3, "nothing changed while it was saved: the test proves nothing"
    assert live.guest.written > before
    assert max(live.guest.looks[1:]) > 4
    live.client.execute("cont")
    assert_qemu_loads(way, path, live.guest.instant)


def test_a_busy_guest_leaves_no_former_bytes_where_pages_turned_zero(
    live: Served, disk: Path
) -> None:
    live.configure(MULTIFD, max_bandwidth=48 << 20, downtime_limit=50)
    live.save(f"file:{disk / 'state'}")
    at_stop = np.frombuffer(live.guest.instant, dtype=np.uint64).reshape(-1, PAGE // 8)
    with open_snapshot(disk / "state") as snapshot, (disk / "state").open("rb") as file:
        block = snapshot.blocks["pc.ram"]
        clear = [page for page in range(PAGES) if not block.bitmap[page]]
        for page in clear:
            file.seek(block.pages_offset + page * PAGE)
            assert not any(file.read(PAGE)), page
    assert clear == np.flatnonzero(~at_stop.any(axis=1)).tolist()


def test_a_guest_that_went_on_can_be_saved_again(live: Served, disk: Path) -> None:
    way = Way("multifd", MULTIFD)
    live.configure(MULTIFD, max_bandwidth=48 << 20, downtime_limit=50)
    live.save(f"file:{disk / 'first'}")
    first = live.guest.instant
    live.client.execute("cont")
    assert live.client.execute("query-status") == {"status": "running", "running": True}
    written = live.guest.written
    while live.guest.written < written + 100:
        time.sleep(0.001)
    live.save(f"file:{disk / 'second'}")
    assert live.guest.instant != first
    assert_qemu_loads(way, disk / "second", live.guest.instant)
    with open_snapshot(disk / "first") as snapshot:
        memory = bytearray(RAM)
        snapshot.load({"pc.ram": memory})
    assert_same_memory(memory, first)


@pytest.mark.parametrize("live", list(Policy), indirect=True, ids=lambda policy: policy.value)
def test_a_busy_guest_is_never_stopped_by_a_save_that_is_cancelled(
    live: Served, disk: Path
) -> None:
    live.configure(MULTIFD, max_bandwidth=1 << 20)
    live.events()
    live.client.execute("migrate", {"uri": f"file:{disk / 'state'}"})
    live.until("active")
    live.client.execute("migrate_cancel")
    assert live.until("cancelled", "failed", "completed") == {"status": "cancelled"}
    first = ["1"] if live.migration.policy.qemu.first_pass_event else []
    assert live.events() == ["setup", *first, "active", "cancelling", "cancelled"]
    assert live.client.execute("query-status") == {"status": "running", "running": True}
    assert not (disk / "state").exists()
    assert live.guest.instant == b""
    live.configure(MULTIFD, max_bandwidth=0)
    live.save(f"file:{disk / 'state'}")
    assert_qemu_loads(Way("multifd", MULTIFD), disk / "state", live.guest.instant)


def test_a_busy_guest_stands_still_before_switchover(live: Served, disk: Path) -> None:
    pausing = {**MULTIFD, "pause-before-switchover": True}
    live.configure(pausing, max_bandwidth=48 << 20, downtime_limit=50)
    live.events()
    live.client.execute("migrate", {"uri": f"file:{disk / 'state'}"})
    live.until("pre-switchover")
    assert live.client.execute("query-status")["status"] == "finish-migrate"
    written = live.guest.written
    time.sleep(0.05)
    assert live.guest.written == written
    assert "RESUME" not in live.events()
    live.client.execute("migrate-continue", {"state": "pre-switchover"})
    assert live.until("completed", "failed")["status"] == "completed"
    assert_qemu_loads(Way("multifd", MULTIFD), disk / "state", live.guest.instant)


def test_a_busy_guest_goes_on_after_a_save_that_failed(live: Served) -> None:
    live.configure(MULTIFD)
    written = live.guest.written
    with pytest.raises(Exception, match="Could not create '/nonexistent/x': No such file"):
        live.client.execute("migrate", {"uri": "file:/nonexistent/x"})
    deadline = time.monotonic() + 20
    while live.guest.written < written + 100:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert live.client.execute("query-status") == {"status": "running", "running": True}
