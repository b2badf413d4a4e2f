"""What a guest's CPUs use, as QEMU saved them, against what QEMU can give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyqmigrate import UsageError, devices
from pyqmigrate.vm.incoming.portability import check_host
from pyqmigrate.vm.qemu.cpu_model import cpu_properties
from tests.harness.command import child
from tests.harness.json_page import assert_as_documented
from tests.harness.machine import BINARY
from tests.harness.saved import RAM, Saved, save_guest

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def saved(module_disk: Path) -> Saved:
    return save_guest(module_disk, ["-M", "pc", "-m", str(RAM >> 20)])


def test_properties_are_those_of_the_model() -> None:
    possible = cpu_properties(BINARY, "tcg", "max")
    assert possible["avx"] is True
    assert cpu_properties(BINARY, "tcg", "qemu64")["avx"] is False
    assert cpu_properties(BINARY, "tcg", "qemu64,+avx")["avx"] is True
    with pytest.raises(UsageError, match="nosuch"):
        cpu_properties(BINARY, "tcg", "nosuch")


def test_guest_of_the_base_can_go_on_here(saved: Saved) -> None:
    report = check_host(saved.path, qemu=BINARY, accelerator="tcg", model="qemu64")
    assert report.possible
    assert (report.use.cpus, report.use.xcr0, report.use.xsave_size) == (1, 1, 576)


def test_feature_that_the_model_lacks_is_found(
    saved: Saved, disk: Path, child_environment: dict[str, str]
) -> None:
    # The guest's kernel switched AVX on: XCR0 in its state has bit 2 set.
    [cpu] = devices(saved.path, name="cpu").devices
    [xcr0] = [field for field in cpu.state.fields if field.name == "env.xcr0"]
    data = bytearray(saved.path.read_bytes())
    at = cpu.body_offset + xcr0.offset
    assert data[at : at + 8] == bytes([0, 0, 0, 0, 0, 0, 0, 1])
    data[at + 7] = 7
    path = disk / "changed"
    path.write_bytes(data)
    report = check_host(path, qemu=BINARY, accelerator="tcg", model="qemu64")
    assert report.missing == ("avx",)
    assert check_host(path, qemu=BINARY, accelerator="tcg", model="qemu64,+avx").possible
    options = ("--qemu", BINARY, "--accel", "tcg", "--cpu", "qemu64", "--host")
    ran = child("info", path, *options, environment=child_environment)
    assert ran.returncode == 1
    assert "add +avx to -cpu" in ran.stdout
    done = child("info", path, *options[:-3], "--host", "--json", environment=child_environment)
    assert done.returncode == 0
    assert_as_documented("info", json.loads(done.stdout))

    given = ("--", BINARY, "-accel", "tcg", "-cpu", "qemu64")
    checked = child(
        "vm", "check", "--for-restore", path, "--json", *given, environment=child_environment
    )
    assert checked.returncode == 1
    found = json.loads(checked.stdout)
    assert found["host"]["missing"] == ["avx"]
    assert {*found} == {"schema", "snapshot", "host"}
    given = (*given[:-1], "qemu64,+avx")
    checked = child("vm", "check", "--for-restore", path, *given, environment=child_environment)
    assert checked.returncode == 0, checked.stderr
    assert "-cpu qemu64,+avx" in checked.stdout


def test_check_for_a_restore_needs_a_command_line(
    saved: Saved, child_environment: dict[str, str]
) -> None:
    ran = child("vm", "check", "--for-restore", saved.path, environment=child_environment)
    assert ran.returncode == 2
    assert "has no record" in ran.stderr


def test_options_of_the_host_need_it(saved: Saved, child_environment: dict[str, str]) -> None:
    ran = child("info", saved.path, "--cpu", "max", environment=child_environment)
    assert ran.returncode == 2
    assert "--host" in ran.stderr
