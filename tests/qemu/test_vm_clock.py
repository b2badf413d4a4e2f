"""What a save and a restore say about the guest's wall clock, and setting it by the agent."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from pyqmigrate.vm.guest.agent import find_agent
from pyqmigrate.vm.incoming.report import RestoreReport
from pyqmigrate.vm.incoming.restore import restore
from pyqmigrate.vm.outgoing.report import VmSaveReport
from pyqmigrate.vm.outgoing.save import save
from tests.harness.agent import Agent
from tests.harness.bare import BareQemu
from tests.harness.linux_guest import LinuxGuest
from tests.harness.machine import BINARY
from tests.harness.unpacked import unpacked

pytestmark = pytest.mark.qemu

MACHINE = ["-M", "pc", "-m", "32", "-nodefaults"]


def saved(path: Path, **options: object) -> VmSaveReport:
    with BareQemu(*MACHINE, run=True) as qemu:
        qemu.run_state()
        return asyncio.run(save(qemu.socket, path, **options))  # type: ignore[arg-type]


def restored(path: Path, **options: object) -> RestoreReport:
    async def run() -> RestoreReport:
        command = [BINARY, *MACHINE, "-display", "none"]
        vm = await restore(path, command, **options)  # type: ignore[arg-type]
        await vm.end()
        return vm.report

    return asyncio.run(run())


def about_clock(notes: tuple[str, ...]) -> list[str]:
    return [note for note in notes if "clock" in note]


def test_clock_is_set_when_the_guest_goes_on_after_a_save(tmp_path: Path) -> None:
    before = time.time_ns()
    with Agent(tmp_path / "agent") as agent:
        report = saved(tmp_path / "s", set_time=True, guest_agent=tmp_path / "agent")
    [told] = agent.times
    assert before < told < time.time_ns()
    assert about_clock(report.notes) == [
        "the guest's clock was set to the host's through its agent"
    ]


def test_clock_of_a_guest_that_stays_paused_is_not_set(tmp_path: Path) -> None:
    with Agent(tmp_path / "agent") as agent:
        saved(tmp_path / "s", then="pause", set_time=True, guest_agent=tmp_path / "agent")
    assert not agent.times


def test_missing_agent_fails_neither_a_save_nor_a_restore(tmp_path: Path) -> None:
    report = saved(tmp_path / "s", set_time=True)
    assert "--guest-agent" in about_clock(report.notes)[0]
    again = restored(tmp_path / "s", set_time=True, guest_agent=tmp_path / "nowhere")
    assert again.run_state == "running"
    assert "was not set" in about_clock(again.notes)[0]


def test_restore_sets_the_clock_or_says_how_far_it_is_behind(tmp_path: Path) -> None:
    saved(tmp_path / "s")
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / "s", (an_hour_ago, an_hour_ago))
    [note] = about_clock(restored(tmp_path / "s").notes)
    assert "60 minutes behind" in note and "--set-time" in note
    assert not about_clock(restored(tmp_path / "s", paused=True).notes)
    with Agent(tmp_path / "agent") as agent:
        report = restored(tmp_path / "s", set_time=True, guest_agent=tmp_path / "agent")
    assert len(agent.times) == 1 and "was set" in about_clock(report.notes)[0]


def agent_files() -> dict[str, bytes]:
    """qemu-ga with all libraries that it needs, as files of a guest's root directory."""
    root = unpacked("agent")
    program = root / "usr/sbin/qemu-ga"
    libraries = root / "usr/lib/x86_64-linux-gnu"
    printed = subprocess.run(
        ["ldd", program],
        capture_output=True,
        text=True,
        check=True,
        env={"LD_LIBRARY_PATH": str(libraries)},
    ).stdout
    paths = [word for word in printed.split() if word.startswith("/")]
    return {
        "bin/qemu-ga": program.read_bytes(),
        **{f"bin/{Path(path).name}": Path(path).read_bytes() for path in paths},
    }


@pytest.mark.long
def test_real_agent_sets_the_clock_of_a_linux(disk: Path) -> None:
    guest = LinuxGuest(disk, files=agent_files())
    channel = [
        "-chardev",
        f"socket,id=ga,path={disk}/ga,server=on,wait=off",
        "-device",
        "isa-serial,chardev=ga,index=1",
    ]
    with guest.boot(*channel) as console:
        console.run("mkdir -p /sbin /run && ln -s /bin/busybox /sbin/hwclock")
        console.run("stty -F /dev/ttyS1 raw -echo")
        console.run(
            "/bin/ld-linux-x86-64.so.2 --library-path /bin /bin/qemu-ga -m isa-serial "
            "-p /dev/ttyS1 -t /run -f /run/qga.pid -d"
        )
        console.run("date -u -s @1000000000 >/dev/null")
        assert int(console.run("date +%s")) < 1_000_000_600
        report = asyncio.run(save(guest.qmp, disk / "s", set_time=True, guest_agent=disk / "ga"))
        assert about_clock(report.notes) == [
            "the guest's clock was set to the host's through its agent"
        ]
        assert abs(int(console.run("date +%s")) - time.time()) < 60


def test_agent_of_a_real_qemu_is_found(tmp_path: Path) -> None:
    agent = [
        "-device",
        "virtio-serial",
        "-chardev",
        f"socket,id=ga,path={tmp_path}/ga,server=on,wait=off",
        "-device",
        "virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
    ]
    with BareQemu(*MACHINE, *agent) as qemu:
        qemu.run_state()
        found = find_agent(qemu.process.pid)
        assert found is not None and found.samefile(tmp_path / "ga")
