"""Directories to mount on, and what is shown there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.mounted import need_fuse


@pytest.fixture
def mount_point(tmp_path: Path) -> Path:
    """An empty directory on which FUSE can be mounted."""
    directory = tmp_path / "mount point"
    directory.mkdir()
    need_fuse(directory)
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty directory whose files are shown."""
    directory = tmp_path / "source"
    directory.mkdir()
    return directory
