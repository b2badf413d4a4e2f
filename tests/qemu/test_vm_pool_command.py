"""``vm pool``: clients of its socket, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyqmigrate.vm import Monitor
from tests.harness import verbs
from tests.harness.bare import BareQemu
from tests.harness.json_page import assert_as_documented
from tests.harness.pools import PoolClient, is_alive, pool_process, until
from tests.harness.saved import RAM, Saved, save_guest, serial_says

pytestmark = pytest.mark.qemu

VERB = [sys.executable, "-m", "pyqmigrate", "vm", "pool"]


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    arguments = ["-M", "microvm", "-m", str(RAM >> 20)]
    return save_guest(module_disk, arguments, ("microvm.ram",))


@pytest.fixture
def command(saved: Saved, tmp_path: Path) -> list[str]:
    return saved.command(serial=tmp_path / "serial-{n}")


def descendants_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return children + [pid for child in children for pid in descendants_of(child)]


def test_client_gets_a_guest_that_goes_on(saved: Saved, command: list[str], tmp_path: Path) -> None:
    with pool_process(saved.path, command, tmp_path / "s", "--ready", "1") as (process, report):
        assert_as_documented("vm pool", report)
        assert report["pid"] == process.pid
        with PoolClient(report["socket"]) as client:
            guest = client.ask("take")["guest"]
            assert guest["run_state"] == "running"
            assert guest["pid"] in descendants_of(process.pid)
            said = serial_says(tmp_path / f"serial-{guest['number']}", 1)
            assert said[0] == len(saved.reports) + 1 & 0x7F

            async def ask() -> str:
                async with await Monitor.connect(guest["qmp"]) as monitor:
                    return str((await monitor.execute("query-status"))["status"])

            assert asyncio.run(ask()) == "running"
            reset = client.ask("reset")
            assert reset["ended"] == guest["number"]
            assert not is_alive(guest["pid"])
            assert not Path(guest["qmp"]).exists()
        until(lambda: not is_alive(reset["guest"]["pid"]), "the client's guest goes on without it")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_pool_and_all_guests(
    saved: Saved, command: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    with pool_process(saved.path, command, tmp_path / "s", "--keep") as (process, report):
        with PoolClient(report["socket"]) as client:
            taken = client.ask("take")["guest"]["pid"]
            guests = descendants_of(process.pid)
            assert taken in guests
            process.send_signal(number)
            assert process.wait(30) == 0
        assert not any(map(is_alive, guests))
        assert not Path(report["socket"]).exists()
        assert not Path(report["directory"]).exists()


@pytest.mark.parametrize("mode", ["instant", "lazy"])
def test_killed_pool_takes_all_guests_with_it_and_another_begins_in_its_place(
    saved: Saved, command: list[str], tmp_path: Path, mode: str
) -> None:
    options = ("--keep", "--mode", mode, "--push", "never")
    with pool_process(saved.path, command, tmp_path / "s", *options) as (process, report):
        assert report["mode"] == mode
        with PoolClient(report["socket"]) as client:
            client.ask("take")
            guests = descendants_of(process.pid)
            assert len(guests) >= (2 if mode == "instant" else 6)  # QEMU, keeper, page server
            process.kill()
            process.wait()
        until(lambda: not any(map(is_alive, guests)), "guests of a killed pool go on")
    with pool_process(saved.path, command, tmp_path / "s") as (process, report):
        with PoolClient(report["socket"]) as client:
            assert client.ask("take")["guest"]["run_state"] == "running"
        process.terminate()
        assert process.wait(30) == 0
    assert [path for path in tmp_path.rglob("*") if path.is_socket()] == []


def test_pool_without_a_command_line_uses_the_record_and_removes_its_overlays(
    disk: Path, tmp_path: Path
) -> None:
    image = disk / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    snapshot = disk / "guest.mapped"
    drive = ("-drive", f"file={image},format=raw,if=virtio")

    async def connected(monitor: object) -> None:
        """It listens."""

    with BareQemu("-M", "q35", "-m", "32M", *drive) as qemu:
        qemu.run(connected)
        verbs.save(qemu.socket, snapshot, "--then", "quit")
    with subprocess.Popen(
        [*VERB, str(snapshot), "--socket", str(tmp_path / "s"), "--with-disks", "--ready", "1"],
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline().startswith(b"pool ")
            overlays = tmp_path / "s.guests"
            with PoolClient(tmp_path / "s") as client:
                guest = client.ask("take")["guest"]
                own = list(overlays.glob(f"{guest['number']}.*.qcow2"))
                assert len(own) == 1
                client.ask("reset")
                assert not own[0].exists()
        finally:
            process.terminate()
            process.stderr.read()
    assert process.returncode == 0
    assert os.listdir(tmp_path) == []


def test_socket_in_use_ends_the_pool_and_its_guests(
    saved: Saved, command: list[str], tmp_path: Path
) -> None:
    places = ("--socket", str(tmp_path / "s"), "--dir", str(tmp_path / "other"))
    with pool_process(saved.path, command, tmp_path / "s", "--ready", "1"):
        ran = subprocess.run(
            [*VERB, str(saved.path), *places, "--", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 3
        assert "cannot listen on the pool's socket: Address already in use" in ran.stderr
        assert not (tmp_path / "other").exists()
        with PoolClient(tmp_path / "s") as client:
            assert client.ask("take")["guest"]["number"] == 1
