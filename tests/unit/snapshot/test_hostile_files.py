"""Small files of every kind, damaged in seeded ways: a result or one of our errors."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest

from pyqmigrate import NotSupported, SnapshotError, UsageError, devices, open_snapshot, provenance
from pyqmigrate.format.device.sections import DeviceSection, encode_devices
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from tests.harness.device_example import BODY, RTC
from tests.harness.stream_builders import EOF, full, page_records, sequential_stream, snapshot

ALLOWED = (SnapshotError, NotSupported, UsageError)
SECTIONS, TEXT = encode_devices([DeviceSection("rtc", BODY, 0, 3, RTC)], 4096)
CLASSIC = sequential_stream(page_records(), devices=SECTIONS, description=TEXT)
MAPPED = snapshot(sections=SECTIONS, description=TEXT)
HEADER = LibvirtHeader(True, 2, ImageFormat.RAW, True, "<domain/>", "<c/>", 300, "little")
FILES = {
    "mapped-ram": MAPPED.read_at(0, MAPPED.size),
    "sequential": CLASSIC,
    "libvirt": encode_header(HEADER) + CLASSIC,
    "devices": b"QEVM\0\0\0\3" + full(3, "rtc", b"abc" * 20) + full(4, "cpu", b"xyz" * 20) + EOF,
}
NUMBERS = [b"\0" * 4, b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\x7e\0\0\0", b"9999", b"-1, ", b'"[{"']


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cuts, inserts, flips and odd numbers, near the file's ends, where everything stands."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(len(data), 800) + 1)
        if rng.random() < 0.5:
            at = len(data) - at
        length, bit = rng.choice((1, 4, 40)), rng.randrange(8)
        data = rng.choice(
            (
                data[:at],
                data[:at] + rng.randbytes(length) + data[at:],
                data[:at] + data[at + length :],
                data[:at] + rng.choice(NUMBERS) + data[at + 4 :],
                data[:at] + bytes(b ^ 1 << bit for b in data[at : at + 1]) + data[at + 1 :],
            )
        )
    return data


def opens(path: Path) -> bool:
    """Looks at everything but the pages; whether it was a result."""
    try:
        found = devices(path)
    except ALLOWED:
        found = None
    try:
        with open_snapshot(path) as opened:
            judged = provenance(opened)
            assert found == devices(opened)
            if judged.loadable:
                opened.verify()
            else:
                with pytest.raises(ALLOWED):
                    opened.verify()
    except ALLOWED:
        return found is not None
    return True


def check_seeds(kind: str, seeds: range) -> None:
    opened = 0
    # Not on the disk: thousands of files would be waited for.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "file"
        for seed in seeds:
            path.write_bytes(damaged(FILES[kind], random.Random(f"{kind} {seed}")))
            opened += opens(path)
    assert len(seeds) // 20 < opened < len(seeds), "the damage is too coarse, or too mild"


@pytest.mark.parametrize("kind", FILES)
def test_damaged_file_ends_in_a_result_or_our_error(kind: str) -> None:
    check_seeds(kind, range(300))


@pytest.mark.long
@pytest.mark.parametrize("kind", FILES)
def test_thousands_of_damaged_files_end_in_a_result_or_our_error(kind: str) -> None:
    check_seeds(kind, range(1000, 6000))
