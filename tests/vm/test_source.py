"""The snapshot that a restore is from, before there is a QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyqmigrate import NotSupported, RamBlock, save
from pyqmigrate.vm.source import Source
from tests.snapshots import ram, turn_bitmaps


@pytest.mark.usefixtures("same_descriptors")
def test_file_whose_bitmaps_qemu_would_misread_here_is_not_restored(disk: Path) -> None:
    save(disk / "s", [RamBlock("ram", ram(1024))], machine="s390-ccw-virtio-10.0", sparse="exact")
    turn_bitmaps(disk / "s")
    with pytest.raises(NotSupported, match="convert it to mapped-ram"):
        Source(disk / "s", None)
