"""What a compact file has besides the plain file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import SnapshotError
from pyqmigrate.format.compact import SUFFIXES, CompactHead
from pyqmigrate.format.digest import Algorithm, digest_of_all
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


def changed(listed: int = 7, **keys: object) -> bytes:
    """The head with other values, and a digest that fits them; ``listed`` bytes are of files."""
    line, _, rest = HEAD.encode().partition(b"\n")
    value = json.loads(line)
    digest = value.pop("digest")
    front = json.dumps(value | keys).encode()[:-1]
    if "digest" not in keys:
        digest = digest_of_all(Algorithm.XXH3_128, [rest[:listed], front]).hex()
    return front + f', "digest": "{digest}"}}\n'.encode() + rest


def test_the_helper_makes_valid_heads() -> None:
    assert CompactHead.decode(changed()) == HEAD
    assert CompactHead.decode(changed(more=1)) == HEAD


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"size": -1}, "out of its range"),
        ({"size": True}, "not a whole number"),
        ({"mtime_ns": "now"}, "not a whole number"),
        ({"files": None}, "no list"),
        ({"files": [{"suffix": "/../../etc/passwd", "length": 3}]}, "unknown kind"),
        ({"files": [{"suffix": ".seal", "length": 1 << 80}]}, "out of its range"),
        ({"files": [{"suffix": ".seal", "length": 3}, {"suffix": ".seal", "length": 4}]}, "twice"),
        ({"files": [{"suffix": ".seal", "length": 6}], "listed": 6}, "are listed"),
        ({"files": [{"suffix": ".seal", "length": 8}]}, "are listed"),
        ({"listed": 6}, "digest"),
    ],
)
def test_impossible_values_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SnapshotError, match=message) as raised:
        CompactHead.decode(changed(**keys))
    assert raised.value.field == "companions"


def test_the_frame_of_another_program_is_not_ours() -> None:
    assert CompactHead.decode(b"something else") is None
