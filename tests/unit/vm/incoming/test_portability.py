"""What is missing on a host, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyqmigrate import NotSupported, QemuError, UsageError
from pyqmigrate.format.device.cpu_features import CpuUse, UsedFeature
from pyqmigrate.vm.incoming import portability
from pyqmigrate.vm.incoming.portability import check_host, host_flags
from pyqmigrate.vm.qemu.cpu_model import cpu_properties, parse_model
from tests.harness.snapshots import save_known

USE = CpuUse(1, 7, 832, (UsedFeature("avx", "XCR0 bit 2"), UsedFeature("lm", "EFER bit 8")), (), ())


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the host and its QEMU have, by model; the test changes it."""
    has: dict[str, Any] = {
        "flags": frozenset({"avx", "lm"}),
        "max": {"avx": True, "lm": True},
        "qemu64": {"avx": False, "lm": True},
        "use": USE,
    }
    monkeypatch.setattr(portability, "_use", lambda target: has["use"])
    monkeypatch.setattr(portability, "host_flags", lambda: has["flags"])
    monkeypatch.setattr(portability, "cpu_properties", lambda qemu, accel, model: has[model])
    monkeypatch.setattr(portability.shutil, "which", lambda name: f"/bin/{name}")
    return has


def test_nothing_is_missing(host: dict[str, Any]) -> None:
    for accelerator in ("kvm", "tcg"):
        report = check_host("guest", accelerator=accelerator)
        assert report.possible
        assert (report.missing, report.model) == ((), "max")


def test_feature_that_the_processor_lacks_stands_against_kvm_only(host: dict[str, Any]) -> None:
    host["flags"] = frozenset({"lm"})
    report = check_host("guest", accelerator="kvm")
    assert report.missing == ("avx",)
    assert "no avx (XCR0 bit 2 of the guest): restore on a host that has it" in report.obstacles[0]
    assert check_host("guest", accelerator="tcg").possible


def test_model_without_the_feature_can_be_given_it(host: dict[str, Any]) -> None:
    report = check_host("guest", accelerator="tcg", model="qemu64")
    assert report.missing == ("avx",)
    assert "add +avx to -cpu" in report.obstacles[0]


def test_feature_that_qemu_cannot_give_needs_another_host(host: dict[str, Any]) -> None:
    host["max"] = {"avx": False, "lm": True}
    report = check_host("guest", accelerator="tcg")
    assert "QEMU with tcg cannot give the guest avx" in report.obstacles[0]


def test_state_that_only_kvm_knows_stands_against_tcg(host: dict[str, Any]) -> None:
    host["use"] = CpuUse(1, 1, 576, (), ("cpu/steal_time_msr",), ("cpu/steal_time_msr",))
    assert "restore it with KVM" in check_host("guest", accelerator="tcg").obstacles[0]
    assert check_host("guest", accelerator="kvm").possible


def test_without_qemu_the_processor_is_compared(
    host: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portability.shutil, "which", lambda name: None)
    report = check_host("guest", accelerator="kvm")
    assert report.qemu is None
    assert "only the processor" in report.notes[0]
    with pytest.raises(UsageError, match="no executable"):
        check_host("guest", qemu="/no/qemu")


def test_accelerator_is_checked() -> None:
    with pytest.raises(UsageError, match="kvm or tcg"):
        check_host("guest", accelerator="xen")


def test_snapshot_without_device_state_is_not_supported(tmp_path: Path) -> None:
    save_known(tmp_path / "a")
    with pytest.raises(NotSupported, match="not known"):
        check_host(tmp_path / "a")


def test_flags_are_read_from_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu lm avx\n\nflags : other\n")
    assert host_flags(tmp_path / "cpuinfo") == {"fpu", "lm", "avx"}
    assert host_flags(tmp_path / "none") == frozenset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host", ("host", {})),
        (
            "qemu64,+avx,-sse3,pku=off,x",
            ("qemu64", {"avx": True, "sse3": False, "pku": False, "x": True}),
        ),
        ("a,phys-bits=40", ("a", {"phys-bits": "40"})),
    ],
)
def test_model_is_parsed(text: str, expected: object) -> None:
    assert parse_model(text) == expected


def test_empty_model_is_refused() -> None:
    with pytest.raises(UsageError, match="not a CPU model"):
        parse_model(",+avx")


def test_qemu_that_does_not_start_is_an_error() -> None:
    with pytest.raises(QemuError, match="did not start: exit code 1"):
        cpu_properties("/bin/false", "tcg", "max")
    with pytest.raises(QemuError, match="cannot start"):
        cpu_properties("/no/qemu", "tcg", "max")
