"""RAM's section has an id that no device's section has, whatever the source has."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyqmigrate import convert, open_snapshot
from pyqmigrate.errors import NotSupported
from pyqmigrate.format.stream.writer import RAM_SECTION_ID
from tests.harness.stream_builders import (
    described,
    device,
    full,
    page_records,
    sequential_stream,
    words,
)


def stream_with_device(path: Path, section_id: int) -> Path:
    devices = full(section_id, "timer", words(5))
    description = described(device("timer", 8))
    path.write_bytes(sequential_stream(page_records(), devices=devices, description=description))
    return path


def ids(path: Path) -> dict[str, int | None]:
    with open_snapshot(path) as snapshot:
        return {section.name: section.section_id for section in snapshot.stream.sections}


@pytest.mark.parametrize("to", ["stream", "mapped-ram"])
def test_device_with_the_former_id_of_ram_keeps_it(tmp_path: Path, to: str) -> None:
    source = stream_with_device(tmp_path / "source", 1)
    convert(source, tmp_path / "there", to=to)
    assert ids(tmp_path / "there") == {"ram": RAM_SECTION_ID, "timer": 1}


def test_device_with_the_id_of_ram_is_refused(tmp_path: Path) -> None:
    source = stream_with_device(tmp_path / "source", RAM_SECTION_ID)
    with pytest.raises(NotSupported, match="another section than RAM's has the id"):
        convert(source, tmp_path / "there", to="mapped-ram")
