"""What ``vm check`` says of real QEMUs, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.cli.arguments import Parser
from pyqmigrate.cli.exit_codes import ExitCode
from pyqmigrate.cli.outcome import Outcome
from pyqmigrate.cli.vm import check as verb
from pyqmigrate.errors import QemuError, TargetError
from pyqmigrate.vm.plan.check import CheckReport, check
from pyqmigrate.vm.plan.engine import Engine
from pyqmigrate.vm.plan.estimate import Basis
from pyqmigrate.vm.plan.live_option import LiveMethod
from pyqmigrate.vm.qemu.monitor import Monitor
from tests.harness.bare import BareQemu
from tests.harness.version import qemu_version

pytestmark = pytest.mark.qemu

MIB = 1 << 20
PAGE = 4096


def shared(path: Path | str, size: int = 64) -> list[str]:
    return [
        "-M",
        "pc,memory-backend=ram0",
        "-m",
        f"{size}M",
        "-object",
        f"memory-backend-file,id=ram0,size={size}M,share=on,mem-path={path}",
    ]


def checked(qemu: BareQemu, directory: Path | None = None, **options: Any) -> CheckReport:
    async def task(monitor: Monitor) -> CheckReport:
        return await check(monitor, directory, **options)

    return qemu.run(task)


def set_up(qemu: BareQemu, command: str, arguments: dict[str, Any]) -> None:
    async def task(monitor: Monitor) -> None:
        await monitor.execute(command, arguments)

    qemu.run(task)


def run_verb(*arguments: str | Path) -> Outcome:
    parser = Parser()
    verb.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["check", *map(str, arguments)])
    outcome = parsed.run(parsed)
    assert isinstance(outcome, Outcome)
    return outcome


def test_data_of_shared_memory_is_counted(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    with ram.open("wb") as file:
        file.truncate(64 * MIB)
        for page in range(1000):
            os.pwrite(file.fileno(), b"x", 8 * MIB + 2 * page * PAGE)
    with BareQemu(*shared(ram)) as qemu:
        report = checked(qemu)
    assert report.estimate.basis is Basis.COUNTED
    rest = sum(block.length for block in report.blocks if block.name != "ram0")
    # The firmware's own pages are counted, too.
    assert 1000 * PAGE <= report.estimate.data <= 1000 * PAGE + rest + MIB


def test_more_than_is_counted_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyqmigrate.vm.plan.estimate._COUNTED_MAX", MIB)
    ram = tmp_path / "ram"
    ram.write_bytes((b"x" * PAGE + bytes(PAGE)) * (256 * MIB // PAGE // 2))
    with BareQemu(*shared(ram, 256)) as qemu:
        report = checked(qemu)
    assert report.estimate.basis is Basis.SAMPLED
    assert 124 * MIB < report.estimate.data < 132 * MIB


def test_directory_is_tried_and_left_empty(tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    directory.mkdir()
    with BareQemu(*shared("/dev/shm")) as qemu:
        report = checked(qemu, directory)
    assert list(directory.iterdir()) == []
    assert report.disk is not None and report.disk.rate > MIB
    assert report.fits and report.possible
    assert report.seconds is not None and report.seconds >= report.need / report.disk.rate
    assert report.disk.direct_io == _takes_direct_io(directory)


def _takes_direct_io(directory: Path) -> bool:
    command = ["dd", "if=/dev/zero", f"of={directory}/probe", "bs=1M", "count=1", "oflag=direct"]
    done = subprocess.run(command, capture_output=True)
    (directory / "probe").unlink(missing_ok=True)
    return done.returncode == 0


def test_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with BareQemu(*shared("/dev/shm")) as qemu, pytest.raises(TargetError):
        checked(qemu, tmp_path / "nowhere")


def test_too_little_space_is_reported(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no new mount namespace may be made here")
    small = tmp_path / "small"
    small.mkdir()
    mount = f'mount -t tmpfs -o size=2m none "{small}" && exec "$@"'
    with BareQemu("-M", "pc", "-m", "64M") as qemu:
        asyncio.run(_greeted(qemu))
        program = (
            "import sys\nfrom tests.qemu.test_vm_check import run_verb\n"
            "outcome = run_verb(*sys.argv[1:])\n"
            "print(int(outcome.code), outcome.data['fits'], outcome.data['free'])\n"
        )
        done = subprocess.run(
            [
                "unshare",
                "-m",
                "sh",
                "-c",
                mount,
                "sh",
                sys.executable,
                "-c",
                program,
                "--qmp",
                str(qemu.socket),
                "--dir",
                str(small),
            ],
            capture_output=True,
            text=True,
        )
    assert done.stdout == f"1 False {2 * MIB}\n", done.stderr


def test_disks_that_can_be_taken_along_are_reported(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    drive = ["-drive", f"file={tmp_path}/disk,format=raw,if=virtio"]
    with BareQemu(*shared("/dev/shm"), *drive) as qemu:
        asyncio.run(_greeted(qemu))
        outcome = run_verb("--qmp", qemu.socket)
        assert outcome.data["with_disks"] is True
        assert any("is possible" in line for line in fields(outcome)["disks"])
        (tmp_path / "disk").unlink()
        outcome = run_verb("--qmp", qemu.socket)
    assert outcome.data["with_disks"] is False
    assert "not a file that this process can reach" in outcome.data["why_no_disks"]
    assert any("is impossible: " in line for line in fields(outcome)["disks"])


def test_disks_that_cannot_be_taken_along_are_reported() -> None:
    drive = ["-drive", "driver=null-co,size=1M,if=virtio"]
    with BareQemu(*shared("/dev/shm"), *drive) as qemu:
        report = checked(qemu)
    assert report.disks_along is False and "null-co" in report.why_no_disks


def test_guest_without_writable_disks_has_none_to_take_along() -> None:
    with BareQemu(*shared("/dev/shm")) as qemu:
        assert checked(qemu).disks_along is None


def test_settings_of_a_save_are_reported() -> None:
    with BareQemu(*shared("/dev/shm")) as qemu:
        asyncio.run(_greeted(qemu))
        outcome = run_verb("--qmp", qemu.socket, "--engine", "qemu")
        assert outcome.data["settings"]["mapped-ram"]["value"] is True
        assert any(line.startswith("mapped-ram=on") for line in fields(outcome)["setting"])
        dense = run_verb("--qmp", qemu.socket, "--engine", "qemu", "--sparse", "dense")
    assert dense.data["settings"]["zero-page-detection"]["value"] == "none"
    assert dense.data["need"] >= dense.data["total_ram"] > outcome.data["need"]


async def _greeted(qemu: BareQemu) -> None:
    async with await qemu.connect():
        pass


def test_engine_and_reason_are_those_of_a_save() -> None:
    with BareQemu(*shared("/dev/shm"), run=True) as qemu:
        assert checked(qemu).choice == checked(qemu, engine="direct").choice
        forced = checked(qemu, engine="qemu").choice
        live = checked(qemu, live=True)
        promised = checked(qemu, live="converge", max_pause=0.05)
    assert forced is not None and forced.engine is Engine.QEMU
    assert live.live is not None and live.choice is not None
    assert live.choice.engine == live.live.engine
    assert [option.method for option in live.methods] == list(LiveMethod)
    assert promised.live is not None and promised.live.expected_pause == 0.05
    assert promised.settings["downtime-limit"].value == 37


def test_pause_that_no_method_keeps_is_a_blocker() -> None:
    with BareQemu(*shared("/dev/shm"), run=True) as qemu:
        report = checked(qemu, live=True, max_pause=0.001)
    assert not report.possible
    assert "converge: to stop the guest" in report.blockers[0]


def test_impossible_demand_is_a_blocker() -> None:
    with BareQemu(*shared("/dev/shm"), run=True) as qemu:
        report = checked(qemu, live="background", engine="direct")
    assert report.choice is None and not report.possible
    assert "engine direct was requested" in report.blockers[0]


@pytest.mark.parametrize(
    ("capability", "what"),
    [
        ("return-path", "fail"),
        ("xbzrle", "excludes"),
        ("x-ignore-shared", "Bad address" if qemu_version() < (11, 0) else "leaves shared memory"),
    ],
)
def test_dangerous_capability_is_reported(capability: str, what: str) -> None:
    with BareQemu(*shared("/dev/shm")) as qemu:
        assert not any(capability in warning for warning in checked(qemu).warnings)
        wanted = [{"capability": capability, "state": True}]
        set_up(qemu, "migrate-set-capabilities", {"capabilities": wanted})
        found = [warning for warning in checked(qemu).warnings if capability in warning]
    assert len(found) == 1 and what in found[0]


def test_compression_is_reported() -> None:
    with BareQemu(*shared("/dev/shm")) as qemu:
        set_up(qemu, "migrate-set-parameters", {"multifd-compression": "zlib"})
        assert any("'zlib'" in warning for warning in checked(qemu).warnings)


def test_direct_io_where_there_is_none_is_reported() -> None:
    """A tmpfs reports no alignment, so this package does not use direct I/O there."""
    with BareQemu(*shared("/dev/shm")) as qemu:
        set_up(qemu, "migrate-set-parameters", {"direct-io": True})
        report = checked(qemu, Path("/dev/shm"))
    assert report.disk is not None and not report.disk.direct_io
    assert any("may kill QEMU" in warning for warning in report.warnings)


def test_paused_guest_saved_by_qemu_is_warned_of_postmigrate() -> None:
    with BareQemu(*shared("/dev/shm")) as qemu:
        warnings = checked(qemu, engine="qemu").warnings
        assert any("postmigrate" in warning for warning in warnings)
        assert any("max-bandwidth" in warning for warning in warnings)
        assert checked(qemu).warnings == ()


@pytest.mark.parametrize(("run", "words"), [(True, "runs ahead"), (False, "as it is now")])
def test_writable_disks_and_their_needs_are_reported(tmp_path: Path, run: bool, words: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    disk = f"file={tmp_path}/disk,format=raw"
    drives = [
        "-drive",
        f"{disk},if=virtio,id=system",
        "-drive",
        f"{disk},if=ide,readonly=on,file.locking=off,media=cdrom",
    ]
    with BareQemu(*shared("/dev/shm"), *drives, run=run) as qemu:
        report = checked(qemu)
    assert [disk.writable for disk in report.disks] == [True, False]
    assert len(report.disk_needs) == 1
    assert "system" in report.disk_needs[0] and words in report.disk_needs[0]


def test_checking_changes_nothing(tmp_path: Path) -> None:
    with BareQemu(*shared("/dev/shm"), run=True) as qemu:

        async def state(monitor: Monitor) -> list[object]:
            asked = (
                "query-status",
                "query-migrate",
                "query-fdsets",
                "query-migrate-capabilities",
                "query-migrate-parameters",
            )
            return [await monitor.execute(command) for command in asked]

        before = qemu.run(state)
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        checked(qemu, tmp_path)
        assert qemu.run(state) == before
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def fields(outcome: Outcome) -> dict[str, Sequence[str]]:
    """The lines of the report by their first word."""
    found: dict[str, list[str]] = {}
    for line in outcome.lines:
        word, _, rest = line.partition(" ")
        found.setdefault(word, []).append(rest.strip())
    return dict(found)


def test_text_and_json_report_the_same(tmp_path: Path) -> None:
    with BareQemu(*shared("/dev/shm")) as qemu:
        asyncio.run(_greeted(qemu))
        outcome = run_verb("--qmp", qemu.socket, "--dir", tmp_path)
        pid = qemu.process.pid
    data, lines = json.loads(json.dumps(outcome.data)), fields(outcome)
    assert outcome.code is ExitCode.DONE and data["possible"]
    assert data["pid"] == pid and f"process {pid}" in lines["QEMU"][0]
    assert (data["engine"], data["way"]) == ("direct", "devices-only")
    assert lines["engine"][0].startswith("direct: ")
    assert lines["machine"] == [f"{data['machine']}, prelaunch"]
    ram = data["blocks"][0]
    assert (ram["name"], ram["kind"], ram["file_backed"]) == ("ram0", "file", True)
    assert any("64.0 MiB" in rest and rest.endswith("file") for rest in lines["ram0"])


def test_verb_ends_with_one_where_nothing_can_be_saved() -> None:
    with BareQemu(*shared("/dev/shm"), "-incoming", "defer") as qemu:
        asyncio.run(_greeted(qemu))
        outcome = run_verb("--qmp", qemu.socket)
    assert outcome.code is ExitCode.BAD
    assert outcome.data["engine"] is None and "incoming" in outcome.data["blockers"][0]
    assert "blocker" in fields(outcome)


def test_verb_without_anybody_listening_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="cannot connect"):
        run_verb("--qmp", tmp_path / "nobody")


def test_whether_a_restore_can_be_lazy_is_told(disk: Path) -> None:
    with BareQemu("-M", "pc", "-m", "32M") as qemu:
        assert checked(qemu).why_not_lazy == ""
    with BareQemu(*shared(disk / "ram", 32)) as qemu:
        assert f"{str(disk / 'ram')!r} on " in checked(qemu).why_not_lazy
