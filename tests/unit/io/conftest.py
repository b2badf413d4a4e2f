"""Files that the tests of this directory write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("file")
    os.truncate(fd, 4 << 20)
    with contextlib.closing(os.fdopen(fd, "r+b")):
        yield fd
