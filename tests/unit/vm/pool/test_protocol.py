"""The lines of a pool's socket: what is accepted, and that nothing else is."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.pool.protocol import Command, Request, decode_line, encode_error, encode_reply

# The machine may be busy with other tests.
QUIETLY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@QUIETLY
@given(command=st.sampled_from(list(Command)), number=st.integers(1, 1 << 40), paused=st.booleans())
def test_request_is_read_as_it_was_written(command: Command, number: int, paused: bool) -> None:
    data: dict[str, object] = {"command": str(command)}
    if command in (Command.RESET, Command.END):
        data["number"] = number
    if command in (Command.TAKE, Command.RESET):
        data["paused"] = paused
    read, identity = decode_line(json.dumps(data).encode())
    assert identity is None
    assert Request.decode(read) == Request(
        command,
        data.get("number"),
        data.get("paused"),  # type: ignore[arg-type]
    )


@QUIETLY
@given(st.binary(max_size=64))
def test_any_bytes_are_an_object_or_a_usage_error(line: bytes) -> None:
    try:
        data, _ = decode_line(line)
    except UsageError:
        return
    assert isinstance(data, dict)


@QUIETLY
@given(st.dictionaries(st.sampled_from(["command", "number", "paused", "id", "x"]), JSON))
def test_any_object_is_a_request_or_a_usage_error(data: dict[str, object]) -> None:
    try:
        request = Request.decode(data)
    except UsageError:
        return
    assert request.command in Command
    assert request.number is None or request.number > 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "command must be take, reset, end, status, not None"),
        ({"command": "quit"}, "command must be"),
        ({"command": ["take"]}, "command must be"),
        ({"command": "take", "number": 1}, "take has no key 'number'"),
        ({"command": "end", "number": True}, "number must be that of a guest, not True"),
        ({"command": "end", "number": 0}, "number must be"),
        ({"command": "end", "number": 1.0}, "number must be"),
        ({"command": "take", "paused": 1}, "paused must be true or false, not 1"),
    ],
)
def test_wrong_request_is_refused_by_what_is_wrong(data: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request.decode(data)


@pytest.mark.parametrize("line", [b"[" * 4000, b"[]", b"1", b"\xff", b'{"a":', b""])
def test_line_that_is_not_an_object_is_refused(line: bytes) -> None:
    with pytest.raises(UsageError, match="a request must be a JSON object"):
        decode_line(line)


@pytest.mark.parametrize("identity", [[], {}, 1.5, True, "x" * 257, 1 << 60])
def test_identity_is_a_short_text_or_a_number(identity: object) -> None:
    with pytest.raises(UsageError, match="id must be"):
        decode_line(json.dumps({"command": "take", "id": identity}).encode())


@QUIETLY
@given(st.text(max_size=20) | st.integers(-(1 << 53) + 1, (1 << 53) - 1))
def test_identity_comes_back_with_the_reply(identity: str | int) -> None:
    _, read = decode_line(json.dumps({"command": "take", "id": identity}).encode())
    reply = encode_reply({"ended": 1}, read)
    assert json.loads(reply) == {"id": identity, "ended": 1}
    assert reply.count(b"\n") == 1


def test_error_is_one_line_with_its_type() -> None:
    line = encode_error(UsageError("first\nsecond"), "a")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "id": "a",
        "error": {"type": "UsageError", "message": "first\nsecond"},
    }
