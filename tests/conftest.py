"""Places to write to: a disk with direct I/O, a file system in memory, small file systems."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.harness.directories import descriptors, directory_on_disk

# `make test` tries few examples of a property; `make test-long` tries the properties again, with many.
settings.register_profile("short", max_examples=30)
settings.register_profile("long", max_examples=300)
settings.load_profile("short")


def pytest_configure() -> None:
    """PYQMIGRATE_TEST_QEMU is the qemu-system-x86_64 that tests and their programs start.

    Signals that a shell ignores in the background, or nohup, end the programs of the tests again.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)
    chosen = os.environ.get("PYQMIGRATE_TEST_QEMU")
    if not chosen:
        return
    if not os.access(chosen, os.X_OK):
        raise pytest.UsageError(
            f"PYQMIGRATE_TEST_QEMU: no program {chosen}: run .ci/ensure-system newer-qemu"
        )
    os.environ["PATH"] = os.pathsep.join([str(Path(chosen).parent), os.environ["PATH"]])


def pytest_collection_finish() -> None:
    """A collection of garbage takes a quarter of a second with thousands of tests in memory; they
    stay until the end, so exclude them from every later one."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def disk() -> Iterator[Path]:
    """An empty directory that takes direct I/O."""
    with directory_on_disk() as directory:
        yield directory


@pytest.fixture
def shm() -> Iterator[Path]:
    """An empty directory on tmpfs."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("/dev/shm is not there to write to")
    with tempfile.TemporaryDirectory(prefix="pyqmigrate-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def same_descriptors() -> Iterator[None]:
    """Fails the test when it ends with other open descriptors than it began with."""
    gc.collect()  # what an earlier test left is closed now, not in the middle of this one
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """Environment for a Python child that has to find the package, and nothing preloaded."""
    root = Path(__file__).resolve().parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *sys.path])
    return environment
