"""A file for the core to write and read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.directories import directory_on_disk
from tests.harness.kernel import File


@pytest.fixture(scope="module")
def file() -> Iterator[File]:
    """A file on a disk, the same for all tests of a module: each writes what it needs."""
    with directory_on_disk() as directory:
        opened = File(directory / "pages")
        yield opened
        opened.close()
