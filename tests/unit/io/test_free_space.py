"""The free space of a file system, for this user."""

import os
from pathlib import Path

import pytest

from pyqmigrate.io.free_space import free_bytes


@pytest.mark.parametrize(("user", "blocks"), [(0, 7), (1000, 5)])
def test_only_root_may_use_reserved_blocks(
    user: int, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = os.statvfs_result((4096, 4096, 10, 7, 5, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: info)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert free_bytes(tmp_path) == blocks * 4096


def test_a_memfd_has_no_limit() -> None:
    fd = os.memfd_create("free")
    try:
        limit = free_bytes(fd)
        assert limit is None or limit > 0
    finally:
        os.close(fd)
