"""The memory that this process may still use: of the host, and within the limits of its cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyqmigrate.io.available_memory import available_memory

MIB = 1 << 20


class System:
    """A /proc and a /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"

    def write(self, path: str, text: str) -> None:
        (self.proc.parent / path).parent.mkdir(parents=True, exist_ok=True)
        (self.proc.parent / path).write_text(text)

    def group(self, path: str, **files: object) -> None:
        """Write a cgroup's files; ``_`` in their names is a dot where it follows "memory"."""
        for name, value in files.items():
            self.write(f"cgroup/{path}/{name.replace('memory_', 'memory.', 1)}", f"{value}\n")

    @property
    def available(self) -> int | None:
        return available_memory(self.proc, self.cgroups)


@pytest.fixture
def system(tmp_path: Path) -> System:
    made = System(tmp_path)
    made.write("proc/meminfo", "MemTotal: 900000 kB\nMemAvailable:   819200 kB\n")
    made.write("proc/self/cgroup", "0::/a/b\n")
    return made


def test_host_without_limits_has_what_the_kernel_reports(system: System) -> None:
    assert system.available == 800 * MIB


def test_limit_of_the_own_group_counts(system: System) -> None:
    system.group("a/b", memory_max=500 * MIB, memory_current=100 * MIB)
    assert system.available == 400 * MIB


@pytest.mark.parametrize("limit", ["memory_max", "memory_high"])
@pytest.mark.parametrize("group", ["a/b", "a", ""])
def test_tightest_limit_of_any_parent_counts(system: System, group: str, limit: str) -> None:
    for each in ("a/b", "a", ""):
        system.group(each, memory_max=700 * MIB, memory_high="max", memory_current=200 * MIB)
    system.group(group, **{limit: 300 * MIB})
    assert system.available == 100 * MIB


def test_page_cache_that_can_be_dropped_is_available(system: System) -> None:
    system.group("a/b", memory_max=500 * MIB, memory_current=500 * MIB)
    system.group("a/b", memory_stat=f"anon 1\ninactive_file {60 * MIB}\nactive_file 7")
    assert system.available == 60 * MIB


def test_group_beyond_its_limit_has_nothing_left(system: System) -> None:
    system.group("a", memory_high=100 * MIB, memory_current=150 * MIB)
    assert system.available == 0


def test_unlimited_or_damaged_groups_are_passed_over(system: System) -> None:
    system.group("a/b", memory_max="max", memory_current=5 * MIB)
    system.group("a", memory_max="many", memory_current=5 * MIB)
    assert system.available == 800 * MIB


def test_limits_of_the_first_version_count(system: System) -> None:
    system.write("proc/self/cgroup", "5:cpu:/x\n4:memory,other:/a\n0::/\n")
    system.group("memory/a", memory_limit_in_bytes=90 * MIB, memory_usage_in_bytes=70 * MIB)
    system.group("memory/a", memory_stat=f"total_inactive_file {MIB}")
    assert system.available == 21 * MIB


def test_group_outside_of_the_namespace_is_bounded_by_the_mounted_root(system: System) -> None:
    system.write("proc/self/cgroup", "0::/../../elsewhere\n")
    system.write("cgroup/../elsewhere/memory.max", "1")
    system.write("cgroup/../elsewhere/memory.current", "1")
    system.group("", memory_max=50 * MIB, memory_current=0)
    assert system.available == 50 * MIB


def test_nothing_known_is_none(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) is None


def test_this_host_is_known() -> None:
    available = available_memory()
    assert available is not None
    assert 0 <= available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
