"""Which processor a command line makes, and where the command line is from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyqmigrate import UsageError, open_snapshot
from pyqmigrate.vm.incoming import restore_cpu as module
from pyqmigrate.vm.incoming.restore_cpu import recorded_model, restore_cpu
from pyqmigrate.vm.record.contents import VmRecord, encode_record
from pyqmigrate.vm.record.place import record_path
from pyqmigrate.vm.record.snapshot_identity import identify
from tests.harness.snapshots import save_known
from tests.harness.vm_records import record

QEMU = "/usr/bin/qemu-system-x86_64"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "guest.mapped"
    save_known(path)
    return path


def write_record(snapshot: Path, command: str, identity: str | None = None) -> VmRecord:
    with open_snapshot(snapshot) as opened:
        own = identify(opened)  # type: ignore[arg-type]
    written = record(command=command.split())._replace(identity=identity or own)
    record_path(snapshot).write_bytes(encode_record(written))
    record_path(snapshot).chmod(0o600)
    return written


@pytest.mark.parametrize(
    ("words", "accelerator", "model"),
    [
        (f"{QEMU} -m 1G", "tcg", "qemu64"),
        ("qemu-system-i386 -m 1G", "tcg", "qemu32"),
        (f"{QEMU} -accel kvm -accel tcg -cpu host,+avx", "kvm", "host,+avx"),
        (f"{QEMU} -M q35,accel=kvm:tcg -cpu EPYC -cpu max", "kvm", "max"),
        (f"{QEMU} -enable-kvm", "kvm", "qemu64"),
    ],
)
def test_processor_is_that_of_the_command_line(
    words: str, accelerator: str, model: str, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "access", lambda path, mode: True)
    with open_snapshot(snapshot) as opened:
        cpu = restore_cpu(opened, words.split())
    assert (cpu.qemu, cpu.accelerator, cpu.model) == (words.split()[0], accelerator, model)
    assert (cpu.faults, cpu.notes) == ((), ())


def test_next_accelerator_is_taken_without_kvm(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    with open_snapshot(snapshot) as opened:
        found = restore_cpu(opened, [QEMU, "-M", "pc,accel=kvm:tcg"])
        only = restore_cpu(opened, [QEMU, "-accel", "kvm"])
    assert (found.accelerator, only.accelerator) == ("tcg", "kvm")


def test_recorded_model_is_that_of_this_snapshot(snapshot: Path) -> None:
    with open_snapshot(snapshot) as opened:
        assert recorded_model(opened) is None
        write_record(snapshot, f"{QEMU} -cpu EPYC,+pku")
        assert recorded_model(opened) == "EPYC,+pku"
        write_record(snapshot, f"{QEMU} -cpu EPYC", identity="of another")
        assert recorded_model(opened) is None
        with pytest.raises(UsageError, match=r"no record .*guest\.mapped\.vm\.json.* after --"):
            restore_cpu(opened)


def test_given_command_line_is_compared_with_the_record(snapshot: Path) -> None:
    write_record(snapshot, f"{QEMU} -M pc -smp 2 -device virtio-net-pci")
    with open_snapshot(snapshot) as opened:
        cpu = restore_cpu(opened, [QEMU, "-M", "q35"])
    assert any("machine type" in fault for fault in cpu.faults)
