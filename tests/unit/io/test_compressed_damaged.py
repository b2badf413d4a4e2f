"""Compressed and piped streams that are cut or damaged soon raise an error of the package."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from pyqmigrate import NotSupported, SnapshotError, UsageError, devices, open_snapshot, provenance
from pyqmigrate.export.convert import convert
from pyqmigrate.export.raw import unpack
from pyqmigrate.format.libvirt import ImageFormat
from tests.harness.pipes import COMPRESS, front, pipe_of
from tests.harness.stream_builders import described, device, full, page_records, sequential_stream

ALLOWED = (SnapshotError, NotSupported, UsageError)
SECONDS = 2.0  # of the processor, for all that is done with one file
HUNG = 60  # seconds


def stream(rng: random.Random) -> bytes:
    """With state that no description explains now and then: then footers are searched for."""
    state = b"".join(
        full(7 + n, f"dev{n}", rng.randbytes(rng.randrange(5000))) for n in range(rng.randrange(3))
    )
    text = described(device("dev0", 300)) if rng.random() < 0.5 else None
    records = page_records() + b"".join(
        (page * 4096 | 0x28).to_bytes(8, "big") + rng.randbytes(4096) for page in range(2, 8)
    )
    return sequential_stream(records, devices=state, description=text)


def damaged(data: bytes, rng: random.Random) -> bytes:
    kind, at = rng.randrange(5), rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[: max(0, len(data) - 1 - rng.randrange(64))]
    if kind == 2:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 3:
        return data[:at] + rng.randbytes(rng.choice((1, 8, 500))) + data[at:]
    return data + rng.choice((bytes(4), bytes(1000), rng.randbytes(100), data))


@contextmanager
def never_hanging() -> Iterator[None]:
    """Ends what hangs, and fails what takes too long of the processor."""

    def end(*_: object) -> NoReturn:
        raise AssertionError("it hangs")

    before, threads = signal.signal(signal.SIGALRM, end), threading.active_count()
    started = time.process_time()
    signal.alarm(HUNG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - started < SECONDS
    assert threading.active_count() == threads


def examine(path: Path) -> bool:
    """Does everything with a file; whether all of it was possible."""
    ended = []
    for work in (devices, provenance_of, verified, converted, unpacked):
        try:
            work(path)
            ended.append(True)
        except ALLOWED:
            ended.append(False)
    return all(ended)


def provenance_of(path: Path) -> None:
    with open_snapshot(path) as snapshot:
        provenance(snapshot)


def verified(path: Path) -> None:
    with open_snapshot(path) as snapshot:
        snapshot.verify()


def converted(path: Path) -> None:
    target = path.with_name("new")
    try:
        convert(path, target, to="mapped-ram")
        target.unlink()
    finally:
        assert not target.exists()


def unpacked(path: Path) -> None:
    directory = path.with_name("raw")
    try:
        with open_snapshot(path) as snapshot:
            unpack(snapshot, directory)
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    finally:
        assert not directory.exists()


def check(form: ImageFormat | None, seeds: range, directory: Path) -> None:
    ends: Counter[bool] = Counter()
    path = directory / "file"
    for seed in seeds:
        rng = random.Random(f"{form} {seed}")
        data = stream(rng)
        if form is None:
            data = damaged(data, rng)
            with never_hanging(), pipe_of(data) as pipe:
                try:
                    convert(pipe, path, to="mapped-ram")
                    path.unlink()
                    ends[True] += 1
                except ALLOWED:
                    assert not path.exists()
                    ends[False] += 1
            continue
        # What is compressed may be damaged, or how it is compressed.
        inner = rng.random() < 0.4
        packed = COMPRESS[form](damaged(data, rng) if inner else data)
        path.write_bytes(front(form) + (packed if inner else damaged(packed, rng)))
        with never_hanging():
            ends[examine(path)] += 1
    assert ends[False] > len(seeds) // 5
    assert ends[True] > 0


@pytest.mark.usefixtures("same_descriptors")
@pytest.mark.parametrize("form", [*COMPRESS, None], ids=lambda form: form.name if form else "pipe")
def test_a_damaged_compressed_stream_ends_soon(form: ImageFormat | None, shm: Path) -> None:
    check(form, range(40), shm)


@pytest.mark.long
@pytest.mark.parametrize("form", [*COMPRESS, None], ids=lambda form: form.name if form else "pipe")
def test_thousands_of_damaged_compressed_streams_end_soon(
    form: ImageFormat | None, shm: Path
) -> None:
    check(form, range(1000, 2000), shm)


@pytest.mark.parametrize("form", [*COMPRESS, None], ids=lambda form: form.name if form else "pipe")
def test_a_search_ends_with_the_stream(form: ImageFormat | None, shm: Path) -> None:
    """Of device state without a footer, in a stream whose end is not known before."""
    data = sequential_stream(page_records(), description=None)
    at = data.index(b"\x03\0\0\0\1", len(data) - 40)
    data = data[:at] + b"\4\0\0\0\7\3dev" + bytes(8) + b"x" * 3000
    with never_hanging(), pytest.raises(SnapshotError):
        if form is None:
            with pipe_of(data) as pipe:
                convert(pipe, shm / "to", to="mapped-ram")
        else:
            (shm / "from").write_bytes(front(form) + COMPRESS[form](data))
            convert(shm / "from", shm / "to", to="mapped-ram")
