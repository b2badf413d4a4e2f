"""A disk, memories to move, and what pytest-benchmark does not show: MiB/s, and the processor time of a
page of 4 KiB (``extra_info["processor"]``, seconds of each round).

PYQMIGRATE_BENCH_DIR is the directory to measure in; without it, a temporary one on a disk.
"""

from __future__ import annotations

import mmap
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# After what is installed: a tree whose core is not compiled must not hide a package that has one.
ROOT = str(Path(__file__).resolve().parents[2])
sys.path[:] = [p for p in sys.path if str(Path(p).resolve()) != ROOT] + [ROOT]

from bench.disk import Disk, NotADisk  # noqa: E402
from bench.results import table  # noqa: E402
from tests.harness.contents import Contents, fill  # noqa: E402

SIZE = 512 << 20
MIB = 1 << 20
_MEASURED = pytest.StashKey[list[dict[str, Any]]]()

Memories = Callable[[Contents], mmap.mmap]


@pytest.fixture(scope="session")
def memories() -> Iterator[Memories]:
    """SIZE bytes of anonymous memory with the contents asked for; made once."""
    made: dict[Contents, mmap.mmap] = {}

    def memory(contents: Contents) -> mmap.mmap:
        if contents not in made:
            made[contents] = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with memoryview(made[contents]) as view:
                fill(view, contents)
        return made[contents]

    yield memory
    for mapping in made.values():
        mapping.close()


@pytest.fixture(scope="session")
def disk() -> Iterator[Disk]:
    """A directory on a disk, removed in the end."""
    given = os.environ.get("PYQMIGRATE_BENCH_DIR")
    refused = []
    for parent in [given] if given else [tempfile.gettempdir(), "/var/tmp", ROOT]:
        with tempfile.TemporaryDirectory(prefix="pyqmigrate-bench-", dir=parent) as name:
            try:
                disk = Disk(Path(name))
            except NotADisk as error:
                refused.append(str(error))
                continue
            yield disk
            return
    pytest.fail(f"set PYQMIGRATE_BENCH_DIR to a directory on a disk ({'; '.join(refused)})")


@pytest.fixture
def target(disk: Disk) -> Iterator[Path]:
    """A path for a file that is not there; removed after the test."""
    path = disk.directory / "guest.mapped"
    yield path
    disk.clear(path)


# pytest-benchmark cannot add a column to its table; its results become a table of this file.


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats(
    config: pytest.Config, benchmarks: list[dict[str, Any]]
) -> Generator[None, Any, Any]:
    config.stash[_MEASURED] = [b for b in benchmarks if "bytes" in b["extra_info"]]
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    measured = config.stash.get(_MEASURED, [])
    if not measured:
        return
    rows = []
    for run in measured:
        size = run["extra_info"]["bytes"] / MIB
        processor = run["extra_info"].get("processor")
        cost = statistics.median(processor) * 1e9 / (size * MIB / 4096) if processor else None
        rows.append(
            [
                run["fullname"].rpartition("/")[2],
                f"{size:.0f}",
                f"{run['median'] * 1000:.1f}",
                f"{size / run['median']:.0f}",
                f"{size / run['min']:.0f}",
                f"{cost:.0f}" if cost is not None else "",
                str(run["rounds"]),
            ]
        )
    terminalreporter.section("throughput, guest memory dealt with in a second")
    head = ["benchmark", "MiB", "median ms", "MiB/s", "best MiB/s", "ns a page", "rounds"]
    terminalreporter.write_line(table(head, rows))
