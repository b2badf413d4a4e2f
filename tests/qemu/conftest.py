"""Skip tests where there is no QEMU to test against; a disk for all tests of a module."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.directories import directory_on_disk
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


@pytest.fixture(scope="module")
def module_disk() -> Iterator[Path]:
    """An empty directory that takes direct I/O, for all tests of a module."""
    with directory_on_disk() as directory:
        yield directory
