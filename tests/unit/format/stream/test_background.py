"""Streams of background snapshots: no RAM END, and an end that shows that they are whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import SnapshotError
from pyqmigrate.format.stream.mapped_ram_reader import parse
from pyqmigrate.format.stream.sequential import SequentialStream, SequentialStreamReader
from pyqmigrate.format.stream.wire import SectionKind
from tests.harness.examples import some
from tests.harness.stream_builders import (
    EOF,
    RAM_EOS,
    Raw,
    Sparse,
    blocks,
    command,
    configured,
    described,
    described_as,
    device,
    end,
    entry,
    full,
    part,
)

HEAD = configured() + blocks(entry("pc.ram", 8192), total=8192)
NAMES = ("timer", "globalstate", "cpu_common")


def read(data: bytes, *, forward: bool = False) -> SequentialStream:
    source = Sparse([(0, data)])
    reader = SequentialStreamReader(
        source,
        0,
        lambda offset: offset + len(RAM_EOS),
        run_out=(lambda: len(data)) if forward else None,
    )
    reader.read_head()
    return reader.stream()


@some
@given(st.data())
def test_ram_ends_before_the_first_device_after_a_part(data: st.DataObject) -> None:
    early = data.draw(st.booleans())  # a device whose state comes before RAM's PARTs
    parts = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=3))
    devices = [(name, size) for name, size in zip(NAMES, sizes, strict=False)]
    has_description = data.draw(st.booleans())
    forward = data.draw(st.booleans())
    before = full(90, "virtio-mem", b"\1" * 9) if early else b""
    bodies = b"".join(full(7 + i, name, b"\5" * size) for i, (name, size) in enumerate(devices))
    listed = [device(name, size) for name, size in devices]
    if early:
        listed.append(device("virtio-mem", 9))
    text = described_as(described(*listed)) if has_description else b""
    stream_data = HEAD + before + part(1, RAM_EOS) * parts + bodies + EOF + text
    found = read(stream_data, forward=forward)
    assert found.background and found.complete and not found.opaque_tail
    assert found.ram_end == found.after_ram == len(HEAD + before) + parts * len(part(1, RAM_EOS))
    names = [s.name for s in found.sections if s.kind is SectionKind.FULL]
    assert names == ["virtio-mem"] * early + [name for name, _ in devices]
    for cut in {1, len(text) + 1, len(text) + 3, len(text) + len(bodies)}:
        with pytest.raises(SnapshotError):
            read(stream_data[: len(stream_data) - cut], forward=forward)


def test_stream_with_an_end_is_no_background_snapshot() -> None:
    data = HEAD + part(1, RAM_EOS) + end(1, RAM_EOS) + full(7, "timer", b"\1" * 8) + EOF
    found = read(data)
    assert not found.background
    assert found.after_ram == found.ram_end + len(end(1, RAM_EOS))


def test_device_without_a_part_of_ram_before_it_does_not_end_ram() -> None:
    with pytest.raises(SnapshotError, match="did not finish"):
        read(HEAD + full(7, "timer", b"\1" * 8) + EOF)


def test_end_of_ram_after_devices_is_refused() -> None:
    data = HEAD + part(1, RAM_EOS) + full(7, "timer", b"\1" * 8) + end(1, RAM_EOS) + EOF
    with pytest.raises(SnapshotError, match="RAM END after device sections"):
        read(data)


def test_switchover_command_between_ram_and_devices_is_read() -> None:
    data = HEAD + part(1, RAM_EOS) + command(11) + full(7, "timer", b"\1" * 8) + EOF
    assert read(data).background


def test_mapped_ram_stream_without_end_is_a_background_snapshot() -> None:
    devices = full(7, "timer", b"\1" * 8)
    file = Raw(inside=part(1, RAM_EOS), ram_end=b"", devices=devices).file()
    stream = parse(file)
    assert stream.background and stream.complete
    assert stream.after_ram == stream.ram_end
    assert [s.kind for s in stream.sections][-1] is SectionKind.FULL
    whole = parse(Raw(inside=part(1, RAM_EOS), devices=devices).file())
    assert not whole.background
