"""What info and devices say of real files, beside what QEMU said when it wrote them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import open_snapshot
from tests.harness.command import Command
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, Qemu
from tests.harness.migrating import migrate
from tests.harness.other_targets import TARGETS, OtherQemu

pytestmark = pytest.mark.qemu

RAM = 16 << 20
UUID = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"


@dataclass(frozen=True)
class Case:
    """How a file is made: capabilities that are on, and how QEMU is started."""

    on: tuple[str, ...] = ()
    machine: str = "pc"
    extra: tuple[str, ...] = ()
    offset: int = 0
    memory: str = ""

    def start(self, ram: GuestRam, *, incoming: bool = False) -> Qemu:
        words = self.memory.split() if self.memory else None
        return Qemu(ram, machine=self.machine, memory=words, incoming=incoming, extra=[*self.extra])

    def uri(self, path: Path) -> str:
        return f"file:{path}" + (f",offset={self.offset}" if self.offset else "")

    def run(self, vm: Qemu, command: str, path: Path) -> None:
        vm.set_capabilities({"events": True, **dict.fromkeys(self.on, True)})
        arguments: dict[str, Any] = {"uri": self.uri(path)}
        if command == "migrate-incoming":
            arguments["exit-on-error"] = False
        vm.execute(command, arguments)
        assert vm.wait()["status"] == "completed"


OLD = f"-machine pc-i440fx-8.2 -m {RAM >> 20}M"
NO_TEXT = f"-machine pc,suppress-vmdesc=on -m {RAM >> 20}M"
CASES = {
    "mapped": Case(on=("mapped-ram",)),
    "mapped-at-an-offset": Case(on=("mapped-ram", "multifd"), offset=0x1234),
    "mapped-of-an-old-machine": Case(on=("mapped-ram",), memory=OLD),
    "mapped-with-bitmaps": Case(on=("mapped-ram", "dirty-bitmaps"), machine="q35"),
    "mapped-with-uuid": Case(on=("mapped-ram", "validate-uuid"), extra=("-uuid", UUID)),
    "sequential": Case(machine="microvm"),
    "sequential-at-an-offset": Case(offset=12345),
    "sequential-of-an-old-machine": Case(memory=OLD),
    "sequential-without-shared": Case(on=("x-ignore-shared",)),
    "sequential-with-uuid": Case(on=("validate-uuid",), extra=("-uuid", UUID)),
    "sequential-without-description": Case(memory=NO_TEXT),
}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.mark.parametrize("name", CASES)
def test_info_shows_what_qemu_wrote_and_loads(name: str, disk: Path, command: Command) -> None:
    case, path = CASES[name], disk / "file"
    path.write_bytes(b"x" * case.offset)
    with GuestRam(RAM) as ram, case.start(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED)
        version = vm.execute("query-version")["qemu"]
        case.run(vm, "migrate", path)
        lengths = {name: used for name, (_, used) in vm.where_blocks_are().items()}
    offset = ["--offset", str(case.offset)] if case.offset else []
    info = command("info", path, "--json", *offset).json
    check(info, case, lengths, (version["major"], version["minor"]))
    ran = command("devices", path, "--json", *offset)
    assert [d["name"] for d in ran.json["devices"]] == [
        s["name"] for s in info["sections"] if s["kind"] == "full"
    ]
    assert ran.json["described"] is ("description" not in name)
    assert all(device["explained"] for device in ran.json["devices"]) is ran.json["described"]
    with GuestRam(RAM) as ram, case.start(ram, incoming=True) as vm:
        case.run(vm, "migrate-incoming", path)  # loadable


def check(info: dict[str, Any], case: Case, lengths: dict[str, int], qemu: tuple[int, int]) -> None:
    assert info["loadable"] and not info["obstacles"]
    assert info["kind"] == ("mapped-ram" if "mapped-ram" in case.on else "stream")
    assert info["capabilities"] == [n for n in ("x-ignore-shared", "mapped-ram") if n in case.on]
    assert info["uuid"] == (UUID if "validate-uuid" in case.on else None)
    assert (info["offset"], info["complete"]) == (case.offset, True)
    assert {block["name"]: block["length"] for block in info["blocks"]} == lengths
    assert info["total_ram"] == sum(lengths.values())
    elsewhere = [block["name"] for block in info["blocks"] if block["external"]]
    assert elsewhere == (["pc.ram"] if "x-ignore-shared" in case.on else [])
    oldest = (9, 0) if "mapped-ram" in case.on else (8, 2)
    told = ".".join(map(str, oldest if case.memory == OLD else qemu))
    if case.machine == "microvm":  # without a version: only the command switchover-start tells
        told = "10.0" if qemu >= (10, 0) else ""
    assert (info["written_by"]["qemu"] or "") == told
    ends = [(s["offset"], s["offset"] + s["length"]) for s in info["sections"]]
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ends))


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_devices_of_other_targets_are_explained(
    target: str, mapped: bool, disk: Path, command: Command
) -> None:
    other = TARGETS[target]
    with GuestRam(other.length) as ram, OtherQemu(other, ram) as qemu, qemu.connect() as qmp:
        migrate(qmp, "migrate", f"file:{disk}/file", mapped=mapped)
    info = command("info", disk / "file", "--json").json
    assert (info["loadable"], other.machine in info["machine"]) == (True, True)
    found = command("devices", disk / "file", "--json").json["devices"]
    assert [d["name"] for d in found if not d["explained"]] == []
    assert {"cpu", "cpu_common", "timer"} & {device["name"] for device in found}
    with open_snapshot(disk / "file") as snapshot:
        snapshot.verify()
