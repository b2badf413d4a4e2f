"""What makes a lazy restore impossible is found in the command line, and on this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyqmigrate.vm.incoming import lazy_checks
from pyqmigrate.vm.incoming.lazy_checks import file_obstacle, userfaultfd_obstacle, why_not_lazy
from pyqmigrate.vm.qemu.command_line import CommandLine


@pytest.fixture(autouse=True)
def usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host on which any user may use userfaultfd."""
    (tmp_path / "userfaultfd").touch()
    monkeypatch.setattr(lazy_checks, "_DEVICE", str(tmp_path / "userfaultfd"))


def obstacle(*words: str) -> str | None:
    return why_not_lazy(CommandLine.parse(["qemu-system-x86_64", *words]))


def test_nothing_is_wrong_with_memory_of_the_process() -> None:
    assert obstacle("-m", "64", "-object", "memory-backend-memfd,id=m,size=64M,share=on") is None


def test_a_file_on_tmpfs_is_fine_whether_it_is_there_or_not() -> None:
    assert file_obstacle(Path("/dev/shm")) is None
    assert file_obstacle(Path("/dev/shm/pyqmigrate-no-such-directory/ram")) is None


@pytest.mark.parametrize(
    "words",
    [["-object", "memory-backend-file,id=m,size=64M,mem-path={}"], ["-mem-path", "{}"]],
    ids=["backend", "mem-path"],
)
def test_a_file_on_another_file_system_is_not(words: list[str]) -> None:
    path = "/proc/version"  # proc is neither tmpfs nor hugetlbfs, on any host
    found = obstacle(*(word.format(path) for word in words))
    assert found is not None
    assert f"{path!r} on proc" in found


@pytest.mark.parametrize(
    "words",
    [
        ["-device", "vfio-pci,host=01:00.0"],
        ["-netdev", "vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0"],
    ],
    ids=["vfio", "vdpa"],
)
def test_devices_that_pin_memory_are_named(words: list[str]) -> None:
    assert "pins all of the guest's memory" in str(obstacle(*words))


def test_a_user_is_told_how_to_get_access(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "setting"
    setting.write_text("0\n")
    monkeypatch.setattr(lazy_checks, "_DEVICE", str(tmp_path / "none"))
    monkeypatch.setattr(lazy_checks, "_SETTING", str(setting))
    monkeypatch.setattr(lazy_checks, "_CAP_SYS_PTRACE", 63)  # which no process has
    assert "vm.unprivileged_userfaultfd" in str(userfaultfd_obstacle())
    setting.write_text("1\n")
    assert userfaultfd_obstacle() is None
    setting.unlink()
    assert userfaultfd_obstacle() == "this kernel has no userfaultfd"
