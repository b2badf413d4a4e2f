"""A QEMU to test against, and a disk to test on."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.machine import BINARY
from tests.harness.version import qemu_version

NEEDED = (9, 1)


@functools.cache
def _why_not() -> str | None:
    """Why the tests against a real QEMU cannot run; None if they can."""
    needed = f"{BINARY} >= {NEEDED[0]}.{NEEDED[1]}"
    if shutil.which(BINARY) is None:
        return f"{needed} is not on the PATH"
    version = qemu_version()
    if version < NEEDED:
        return f"{needed} is needed, found: {'.'.join(map(str, version))}"
    return None


def pytest_collection_finish(session: pytest.Session) -> None:
    needs_qemu = any(item.get_closest_marker("qemu") for item in session.items)
    if needs_qemu and os.environ.get("CI") == "true" and (reason := _why_not()):
        pytest.exit(f"CI=true, and {reason}", returncode=1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("qemu") and (reason := _why_not()):
        pytest.skip(reason)


def _accepts_direct_io(directory: Path) -> bool:
    """Opening alone proves little: an aligned write must succeed."""
    probe = directory / "probe"
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, 1 << 20) as block:
            return os.pwrite(fd, block, 1 << 20) == 1 << 20
    except OSError:
        return False
    finally:
        os.close(fd)
        probe.unlink()


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    for parent in (tempfile.gettempdir(), "/var/tmp"):
        with tempfile.TemporaryDirectory(prefix="pyqmigrate-", dir=parent) as name:
            if _accepts_direct_io(Path(name)):
                yield Path(name)
                return
    # QEMU dies of direct I/O where the file system refuses it, so it must not get that far.
    pytest.fail("no temporary directory accepts direct I/O: set TMPDIR to one on a disk")


@pytest.fixture
def disk() -> Iterator[Path]:
    """An empty directory that accepts direct I/O; removed after the test."""
    with _scratch() as directory:
        yield directory


@pytest.fixture(scope="module")
def module_disk() -> Iterator[Path]:
    """As ``disk``, for all tests of a module."""
    with _scratch() as directory:
        yield directory
