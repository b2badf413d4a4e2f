"""Small files made to take long, or much memory: each ends within a second and 256 MiB."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.stream_builders import Raw, described, device, end, full, part, start, words

SECONDS = 1.0  # of the processor, if it makes 20 million additions in that time
MEMORY = 256 << 10  # KiB
# Looks at everything in a process of its own; says what came of it and what that took.
EXAMINE = """
import json, resource, sys, time
from pyqmigrate import NotSupported, SnapshotError, devices, open_snapshot, provenance

def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def attempt(call):
    started = time.process_time()
    try:
        call()
        ended = "result"
    except (NotSupported, SnapshotError) as error:
        ended = f"{type(error).__name__}: {error}"
    return ended, time.process_time() - started

def look():
    with open_snapshot(sys.argv[1]) as snapshot:
        provenance(snapshot)
        snapshot.verify()

def speed():  # seconds of two million additions
    started, total = time.process_time(), 0
    for number in range(2_000_000):
        total += number
    return time.process_time() - started

speeds = [speed()]
before = used()
found = [attempt(lambda: devices(sys.argv[1])), attempt(look)]
memory = used() - before
speeds.append(speed())
print(json.dumps({"found": found, "memory": memory, "speed": max(speeds)}))
"""


def examined(path: Path) -> tuple[list[str], list[float], int]:
    """How each attempt ended, its seconds of such a processor, KiB of memory in all."""
    command = [sys.executable, "-c", EXAMINE, str(path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    answer = json.loads(said)
    slower = max(answer["speed"] * 10, 1.0)  # the processor is shared, and slower at times
    seconds = [seconds / slower for _, seconds in answer["found"]]
    return [ended for ended, _ in answer["found"]], seconds, answer["memory"]


def state(body: bytes, *fields: object, times: int = 1, **more: object) -> Raw:
    """A device section of one description, ``times`` over."""
    entry = {"name": "a", "instance_id": 0, "fields": fields, **more}
    text = json.dumps({"page_size": 4096, "devices": [entry]}).encode()
    return Raw(devices=full(9, "a", body) * times, description=text)


def field(size: int, kind: str = "u", **more: object) -> dict[str, object]:
    return {"size": size, "type": kind, "name": "x", **more}


def many_sections_of_one_long_description() -> Raw:
    return state(b"", *[field(0)] * 1000, times=30_000)


def many_structs_of_nothing() -> Raw:
    inner = {"fields": [field(0)] * 900}
    return state(b"", field(0, "struct", struct=inner), times=30_000)


def long_array_of_structs() -> Raw:
    inner = {"fields": [field(1, "bool")]}
    return state(bytes(100_000), field(1, "struct", array_len=100_000, struct=inner), times=20)


def long_list() -> Raw:
    return state(b"\1" * (1 << 20) + b"\0", field((1 << 20) + 1, "qtailq", fields=[]))


def long_arrays_of_booleans() -> Raw:
    return state(bytes(1 << 20), field(1, "bool", array_len=1 << 20), times=4)


def subsections_that_fail() -> Raw:
    subsections = [{"vmsd_name": "x", "version": 1, "fields": []}] * 40_000
    return state(b"\5\1x\0\0\0\1" * 30_000, times=10, subsections=subsections)


def live(name: str, version: int, first: bytes, body: bytes, times: int = 1) -> Raw:
    sections = start(5, name, version, first) + part(5, body) * times + end(5, body[-8:])
    return Raw(before=sections, pages_offset=16 << 20)


def dirty_bitmaps_of_empty_chunks() -> Raw:
    return live("dirty-bitmap", 1, b"\1", bytes(1 << 16) + b"\1", times=70)


def hash_table_of_empty_runs() -> Raw:
    run = struct.pack(">IHH", 0, 0, 7)
    return live("spapr/htab", 1, bytes(4), bytes(4) + run * (1 << 19) + bytes(8))


def storage_attributes_of_nothing() -> Raw:
    return live("s390-storage_attributes", 0, words(1), words(8) * (1 << 19) + words(1))


def one_body_that_is_a_hole() -> Raw:
    """As long as is decoded at once, and in structs."""
    length = 95 << 20
    entry: dict[str, object] = {"fields": [field(length - 1, "buffer"), field(1, "bool")]}
    for _ in range(20):
        entry = {"fields": [field(length, "struct", struct=entry)]}
    text = json.dumps({"page_size": 4096, "devices": [entry | {"name": "a", "instance_id": 0}]})
    return Raw(devices=full(9, "a", bytes(length)), description=text.encode())


def huge_block_of_small_pages() -> Raw:
    """Its bitmap of 1.9 GiB is a hole, and so are its pages."""
    length, page = 15 << 40, 1024
    return Raw(length=length, total=length, page_size=page, pages_offset=2 << 30)


def sections_without_end() -> Raw:
    return Raw(devices=full(9, "a", b"") * 120_000, description=described(device("a", 0)))


@pytest.mark.parametrize(
    "make",
    [
        many_sections_of_one_long_description,
        many_structs_of_nothing,
        long_array_of_structs,
        long_list,
        long_arrays_of_booleans,
        subsections_that_fail,
        dirty_bitmaps_of_empty_chunks,
        one_body_that_is_a_hole,
        huge_block_of_small_pages,
        hash_table_of_empty_runs,
        storage_attributes_of_nothing,
        sections_without_end,
    ],
)
def test_crafted_file_ends_within_a_second(make: Callable[[], Raw], tmp_path: Path) -> None:
    made = make().file()
    path = tmp_path / "crafted"
    with path.open("wb") as file:
        file.truncate(made.size)
        for offset, piece in made.pieces:
            file.seek(offset)
            file.write(piece)
    for _ in range(3):  # it becomes slower from one moment to the next
        ended, seconds, memory = examined(path)
        if max(seconds) < SECONDS:
            break
    path.unlink()
    assert max(seconds) < SECONDS, (ended, seconds)
    assert memory < MEMORY, ended
