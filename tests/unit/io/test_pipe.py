"""Streams that pass by once: through a pipe, or out of a decompressor."""

from __future__ import annotations

import itertools
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import (
    NotSupported,
    RamBlock,
    SnapshotError,
    UsageError,
    devices,
    open_snapshot,
    provenance,
    save,
)
from pyqmigrate.export.convert import convert
from pyqmigrate.format.libvirt import ImageFormat
from pyqmigrate.io.pipe import KEPT_MAX, ForwardInput
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.detect import snapshot_of
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.converted import FORMS, content
from tests.harness.directories import directory_on_disk
from tests.harness.examples import some
from tests.harness.pipes import COMPRESS, front, pipe_of
from tests.harness.snapshots import Bytes, known_memory
from tests.harness.stream_builders import (
    EOF,
    described,
    device,
    full,
    page_records,
    sequential_stream,
)

COMMAND = [sys.executable, "-m", "pyqmigrate"]


def save_stream(path: Path) -> Bytes:
    memory = known_memory()
    start_sequential_save(path, [RamBlock("ram", memory)], machine="pc-q35-10.0").wait()
    return memory


@pytest.mark.usefixtures("same_descriptors")
@pytest.mark.parametrize("form", FORMS)
def test_stream_comes_through_a_pipe(disk: Path, form: str) -> None:
    memory = save_stream(disk / "from")
    with pipe_of((disk / "from").read_bytes(), 12345) as path:
        convert(path, disk / "to", to=form)
    assert content(disk / "to", form) == memory.tobytes()


@some
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=9))
def test_pieces_in_which_it_comes_do_not_matter(sizes: list[int]) -> None:
    state = full(7, "timer", b"\5" * 300)
    data = sequential_stream(
        page_records() * 3, devices=state, description=described(device("timer", 300))
    )

    def start() -> Callable[[int, Callable[[], bool]], bytes]:
        left, pieces = data, itertools.cycle(sizes)

        def read(length: int, _: object) -> bytes:
            nonlocal left
            size = min(next(pieces), length)
            piece, left = left[:size], left[size:]
            return piece

        return read

    with directory_on_disk() as disk:
        source = ForwardInput("it", start, lambda: None, again=True)
        with snapshot_of(StreamFile(source)) as snapshot:
            for _ in range(2):
                convert(snapshot, disk / "to", to="mapped-ram")
            found = devices(snapshot).devices
            assert [one.name for one in found] == ["timer"]
        (disk / "from").write_bytes(data)
        convert(disk / "from", disk / "other", to="mapped-ram")
        assert (disk / "to").read_bytes() == (disk / "other").read_bytes()


def test_device_state_comes_along_byte_for_byte(disk: Path) -> None:
    # A footer in the body: only the description, at the end, tells its length.
    body = b"\x7e\0\0\0\7" + EOF + b"\6" * 500
    data = sequential_stream(
        page_records(),
        devices=full(7, "timer", body),
        description=described(device("timer", len(body))),
    )
    with pipe_of(data, 700) as path:
        convert(path, disk / "to", to="mapped-ram")
    with open_snapshot(disk / "to") as snapshot:
        [section] = [s for s in snapshot.stream.sections if s.name == "timer"]
        assert snapshot.source.read_at(section.body_offset, section.body_length) == body


def test_other_page_size_than_the_description_tells_is_refused(disk: Path) -> None:
    save = start_sequential_save(
        disk / "from", [RamBlock("ram", bytes(1 << 16), 8192)], machine="clipper"
    )
    save.wait()
    data = (disk / "from").read_bytes()
    with pipe_of(data) as path, pytest.raises(SnapshotError, match="8192"):
        convert(path, disk / "to", to="mapped-ram")
    with pipe_of(data) as path, open_snapshot(path, page_size=8192, allow_pipe=True) as snapshot:
        convert(snapshot, disk / "to", to="mapped-ram")
    assert content(disk / "to", "mapped-ram") == bytes(1 << 16)


def test_what_has_passed_by_cannot_be_read_again(disk: Path) -> None:
    save_stream(disk / "from")
    with (
        pipe_of((disk / "from").read_bytes()) as path,
        open_snapshot(path, allow_pipe=True) as snapshot,
    ):
        with pytest.raises(NotSupported, match="at random"):
            snapshot.blocks["ram"].read(0, 1)
        snapshot.verify()
        with pytest.raises(UsageError, match="was read already"):
            convert(snapshot, disk / "to", to="raw")
    assert not (disk / "to").exists()


def test_pipe_is_not_a_snapshot_where_pages_are_read_at_random(disk: Path) -> None:
    save_stream(disk / "from")
    data = (disk / "from").read_bytes()
    with pipe_of(data) as path, pytest.raises(UsageError, match="regular file"):
        open_snapshot(path)
    with pipe_of(data) as path, pytest.raises(UsageError, match="regular file"):
        convert(path, disk / "to", to="elf")
    save(disk / "mapped", [RamBlock("ram", known_memory())])
    with (
        pipe_of((disk / "mapped").read_bytes()) as path,
        pytest.raises(NotSupported, match="fixed places"),
    ):
        convert(path, disk / "to", to="mapped-ram")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.999, 1.0])
def test_cut_pipe_is_a_snapshot_error_or_whole(disk: Path, share: float) -> None:
    save_stream(disk / "from")
    data = (disk / "from").read_bytes()
    with pipe_of(data[: int(len(data) * share)]) as path:
        if share < 1:
            with pytest.raises(SnapshotError):
                convert(path, disk / "to", to="mapped-ram")
        else:
            convert(path, disk / "to", to="mapped-ram")
    assert (disk / "to").exists() == (share == 1)


def test_endless_device_state_is_bounded(disk: Path) -> None:
    data = sequential_stream(page_records(), description=None)

    def start() -> Callable[[int, Callable[[], bool]], bytes]:
        pieces = iter([data])
        return lambda length, _: next(pieces, bytes(length))

    source = ForwardInput("it", start, lambda: None)
    with snapshot_of(StreamFile(source)) as snapshot, pytest.raises(NotSupported, match="MiB"):
        convert(snapshot, disk / "to", to="mapped-ram")
    assert KEPT_MAX < 1 << 30


def test_waiting_pipe_can_be_cancelled(disk: Path) -> None:
    data = sequential_stream(page_records())
    read_end, write_end = os.pipe()
    os.write(write_end, data[:5000])
    with open_snapshot(f"/proc/self/fd/{read_end}", allow_pipe=True) as snapshot:
        job = snapshot.start_load({"pc.ram": bytearray(65536)})
        time.sleep(0.2)
        assert not job.done()
        job.cancel()
        assert job.join(2)
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize(
    "verb", [["convert", "/dev/stdin", "to", "--to", "raw"], ["unpack", "/dev/stdin", "to"]]
)
@pytest.mark.parametrize("kind", ["pipe", "socket", "fifo"])
def test_commands_take_standard_input(
    disk: Path, child_environment: dict[str, str], verb: list[str], kind: str
) -> None:
    memory = save_stream(disk / "from")
    data = (disk / "from").read_bytes()
    ours: int
    if kind == "pipe":
        theirs, ours = os.pipe()
    elif kind == "socket":
        pair = socket.socketpair()
        theirs, ours = pair[0].detach(), pair[1].detach()
    else:
        os.mkfifo(disk / "fifo")
        verb = [str(disk / "fifo") if word == "/dev/stdin" else word for word in verb]
        theirs, ours = os.open(os.devnull, os.O_RDONLY), -1
    process = subprocess.Popen(
        [*COMMAND, *verb], stdin=theirs, cwd=disk, env=child_environment, stdout=subprocess.DEVNULL
    )
    os.close(theirs)
    if ours < 0:
        time.sleep(0.5)  # nobody has opened it for writing yet
        ours = os.open(disk / "fifo", os.O_WRONLY)
    with os.fdopen(ours, "wb") as file:
        file.write(data)
    assert process.wait(60) == 0
    assert (disk / "to/ram.raw").read_bytes() == memory.tobytes()


def test_seal_says_that_a_pipe_is_not_a_file(disk: Path, child_environment: dict[str, str]) -> None:
    save_stream(disk / "from")
    ran = subprocess.run(
        [*COMMAND, "seal", "/dev/stdin"],
        input=(disk / "from").read_bytes(),
        check=False,
        env=child_environment,
        capture_output=True,
    )
    assert ran.returncode == 2
    assert b"neither a regular file nor a block device" in ran.stderr


@pytest.mark.usefixtures("same_descriptors")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_image_is_converted(disk: Path, kind: ImageFormat, form: str) -> None:
    memory = save_stream(disk / "from")
    packed = COMPRESS[kind]((disk / "from").read_bytes())
    (disk / "image").write_bytes(front(kind) + packed)
    convert(disk / "image", disk / "to", to=form)
    assert content(disk / "to", form) == memory.tobytes()
    with pipe_of(front(kind) + packed) as path:
        convert(path, disk / "piped", to=form)
    assert content(disk / "piped", form) == memory.tobytes()


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_image_is_looked_into(disk: Path, kind: ImageFormat) -> None:
    memory = save_stream(disk / "from")
    (disk / "image").write_bytes(front(kind) + COMPRESS[kind]((disk / "from").read_bytes()))
    with open_snapshot(disk / "image") as snapshot:
        assert snapshot.libvirt is not None
        assert snapshot.libvirt.format is kind
        for _ in range(2):
            snapshot.verify()
            buffer = bytearray(len(memory))
            snapshot.load({"ram": buffer})
            assert buffer == memory.tobytes()
        assert provenance(snapshot).loadable
        assert snapshot.size == (disk / "image").stat().st_size
        with pytest.raises(NotSupported, match="at random"):
            snapshot.blocks["ram"].read(0, 1)
    with pytest.raises(UsageError, match="index"):
        open_snapshot(disk / "image", index=disk / "index")


@pytest.mark.parametrize("kind", COMPRESS)
def test_members_one_after_another_are_one_stream(disk: Path, kind: ImageFormat) -> None:
    memory = save_stream(disk / "from")
    data = (disk / "from").read_bytes()
    parts = [COMPRESS[kind](data[:300_000]), COMPRESS[kind](data[300_000:])]
    (disk / "image").write_bytes(front(kind) + b"".join(parts))
    convert(disk / "image", disk / "to", to="mapped-ram")
    assert content(disk / "to", "mapped-ram") == memory.tobytes()


@pytest.mark.parametrize("kind", COMPRESS)
@some
@given(data=st.data())
def test_damaged_image_is_a_snapshot_error(kind: ImageFormat, data: st.DataObject) -> None:
    packed = bytearray(COMPRESS[kind](sequential_stream(page_records() * 20)))
    at = data.draw(st.integers(0, len(packed) - 1))
    if data.draw(st.booleans()):
        del packed[at:]
    else:
        packed[at] ^= data.draw(st.integers(1, 255))
    with directory_on_disk() as disk:
        (disk / "image").write_bytes(front(kind) + packed)
        try:
            convert(disk / "image", disk / "to", to="mapped-ram")
        except (SnapshotError, NotSupported):  # also a record that says "compressed page"
            assert not (disk / "to").exists()


@pytest.mark.parametrize("kind", COMPRESS)
def test_bomb_is_taken_a_piece_at_a_time(disk: Path, kind: ImageFormat) -> None:
    """Zeros where device state would be: more than is kept, and nothing near that in memory."""
    stream = sequential_stream(page_records(), description=None)[:-1]
    (disk / "image").write_bytes(front(kind) + COMPRESS[kind](stream + bytes(KEPT_MAX + (8 << 20))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((NotSupported, SnapshotError)):
        convert(disk / "image", disk / "to", to="mapped-ram")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160 << 10
