"""What a compact file has besides the plain file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import SnapshotError
from pyqmigrate.format.compact import SUFFIXES, CompactHead
from tests.harness.examples import some

HEADS = st.builds(
    CompactHead,
    st.integers(0, (1 << 63) - 1),
    st.integers(-(1 << 62), (1 << 62)),
    st.dictionaries(st.sampled_from(SUFFIXES), st.binary(max_size=60)),
)
HEAD = CompactHead(1 << 20, 12345, {".seal": b"seal\n", ".vm.json": b"{}"})


@some
@given(HEADS)
def test_a_head_is_decoded_as_it_was_encoded(head: CompactHead) -> None:
    assert CompactHead.decode(head.encode()) == head


@some
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_is_found(place: int, turn: int) -> None:
    data = bytearray(HEAD.encode())
    data[place % len(data)] ^= turn
    try:
        found = CompactHead.decode(bytes(data))
    except SnapshotError:
        return
    assert found is None  # its first bytes were changed: another program's frame


@some
@given(st.integers(0, 10_000))
def test_a_head_that_is_cut_off_is_refused(length: int) -> None:
    data = HEAD.encode()
    cut = data[: length % len(data)]
    try:
        assert CompactHead.decode(cut) is None
        assert len(cut) < 40
    except SnapshotError:
        pass


def changed(**keys: object) -> bytes:
    line, _, rest = HEAD.encode().partition(b"\n")
    return json.dumps(json.loads(line) | keys).encode() + b"\n" + rest


@pytest.mark.parametrize(
    "keys",
    [
        {"version": 2},
        {"size": -1},
        {"size": True},
        {"mtime_ns": "now"},
        {"files": None},
        {"files": [{"suffix": "/../../etc/passwd", "length": 3}]},
        {"files": [{"suffix": ".seal", "length": 1 << 80}]},
        {"files": [{"suffix": ".seal", "length": 1}] * 2},
        {"files": [{"suffix": ".seal", "length": 7}]},
        {"digest": "00"},
    ],
)
def test_impossible_values_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(SnapshotError) as raised:
        CompactHead.decode(changed(**keys))
    assert raised.value.field == "companions"


def test_the_frame_of_another_program_is_not_ours() -> None:
    assert CompactHead.decode(b"something else") is None
