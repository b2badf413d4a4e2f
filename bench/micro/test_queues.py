"""Direct writes of 1 MiB, by two threads with eight at once each: native AIO, which the core uses, against
io_uring in its forms. Nothing of this package is measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.disk import Disk
from bench.micro.conftest import MIB, SIZE

SOURCE = Path(__file__).with_name("queues.c")
THREADS, DEPTH = 2, 8
UNSUPPORTED = 3


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("queues") / "queues"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-Wall", "-pthread", SOURCE, "-o", built], check=True)
    return built


@pytest.mark.parametrize("way", ["sync", "aio", "uring", "fixed", "polled"])
def test_direct_writes_by(
    benchmark: Any, program: Path, disk: Disk, target: Path, way: str
) -> None:
    processor: list[float] = []

    def write() -> None:
        depth = 1 if way == "sync" else DEPTH
        ran = subprocess.run(
            [program, way, target, str(SIZE // MIB), str(depth), str(THREADS)],
            capture_output=True,
            text=True,
        )
        if ran.returncode == UNSUPPORTED:
            pytest.skip(f"not on this kernel or device: {ran.stderr.strip()}")
        assert ran.returncode == 0, ran.stderr
        processor.append(float(ran.stdout.split()[1]))

    benchmark.group = "direct writes"
    benchmark.extra_info.update(bytes=SIZE, processor=processor)
    benchmark.pedantic(write, setup=lambda: disk.clear(target), rounds=5)
    assert target.stat().st_size == SIZE
