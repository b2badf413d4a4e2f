import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import UsageError
from pyqmigrate.qapi import types as qapi

SHAPE = qapi.Struct(
    {
        "id": qapi.INT,
        "name": qapi.optional(qapi.STR),
        "on": qapi.optional(qapi.BOOL),
        "small": qapi.optional(qapi.UINT8),
        "big": qapi.optional(qapi.UINT64),
        "word": qapi.optional(qapi.Words(("one", "two"))),
        "text": qapi.optional(qapi.STR_OR_NULL),
        "list": qapi.optional(qapi.ListOf(qapi.Struct({"x": qapi.UINT8}))),
        "words": qapi.optional(qapi.ListOf(qapi.Words(("one",)))),
    }
)


def refusal(**members):
    with pytest.raises(UsageError) as caught:
        SHAPE.read({"id": 1} | members)
    return str(caught.value)


def test_members_come_back_in_the_order_of_declaration():
    assert list(SHAPE.read({"on": True, "name": "x", "id": 3})) == ["id", "name", "on"]


def test_optional_members_may_be_absent():
    assert SHAPE.read({"id": 3}) == {"id": 3}


def test_a_missing_member_is_named():
    with pytest.raises(UsageError, match=r"^Parameter 'id' is missing$"):
        SHAPE.read({})


@pytest.mark.parametrize("value", ["1", 1.0, True, None, 2**63, -(2**63) - 1, []])
def test_what_is_not_a_signed_64_bit_integer_is_of_the_wrong_type(value):
    assert refusal(id=value) == "Invalid parameter type for 'id', expected: integer"


@pytest.mark.parametrize(
    ("member", "value", "word"),
    [
        ("name", 1, "string"),
        ("name", None, "string"),
        ("on", 1, "boolean"),
        ("on", "true", "boolean"),
        ("text", 1, "StrOrNull"),
        ("text", [], "StrOrNull"),
        ("word", 1, "string"),
        ("list", {}, "array"),
        ("list", None, "array"),
    ],
)
def test_a_wrong_type_is_reported_with_the_one_expected(member, value, word):
    assert refusal(**{member: value}) == (
        f"Invalid parameter type for '{member}', expected: {word}"
    )


@pytest.mark.parametrize("value", ["1", 1.0, True, None, 2**64, -(2**63) - 1])
def test_what_is_not_an_integer_of_64_bits_is_not_an_unsigned_one(value):
    assert refusal(small=value) == "Parameter 'small' expects uint64"
    assert refusal(big=value) == "Parameter 'big' expects uint64"


@pytest.mark.parametrize("value", [256, -1, -(2**63), 2**64 - 1])
def test_a_number_too_large_for_its_type_is_told_the_type(value):
    assert refusal(small=value) == "Parameter 'small' expects uint8_t"


@given(st.integers(-(2**63), 2**64 - 1))
def test_a_negative_number_wraps_around_in_64_bits(value):
    assert SHAPE.read({"id": 1, "big": value})["big"] == value % 2**64


def test_null_is_the_empty_text_where_it_is_allowed():
    assert SHAPE.read({"id": 1, "text": None})["text"] == ""


def test_an_unknown_word_is_reported_without_its_path():
    assert refusal(word="three") == "Parameter 'word' does not accept value 'three'"
    assert refusal(words=["two"]) == "Parameter 'null' does not accept value 'two'"


def test_places_in_lists_are_shown_with_their_index():
    assert refusal(list=[1]) == "Invalid parameter type for 'list[0]', expected: object"
    assert refusal(list=[{"x": 1}, {}]) == "Parameter 'list[1].x' is missing"
    assert refusal(list=[{"x": 1, "y": 2}]) == "Parameter 'list[0].y' is unexpected"
    assert refusal(list=[{"x": "1"}]) == "Parameter 'list[0].x' expects uint64"
    assert refusal(list=[{"x": 256}]) == "Parameter 'x' expects uint8_t"


def test_an_undeclared_member_is_complained_about_last():
    assert refusal(zzz=1) == "Parameter 'zzz' is unexpected"
    assert refusal(zzz=1, on=5) == "Invalid parameter type for 'on', expected: boolean"


TAGGED = qapi.Struct(
    {"kind": qapi.Words(("a", "b"))},
    "kind",
    {"a": qapi.Struct({"x": qapi.STR}), "b": qapi.Struct({"y": qapi.STR})},
)


def test_the_tag_chooses_the_members():
    assert TAGGED.read({"y": "1", "kind": "b"}) == {"kind": "b", "y": "1"}
    with pytest.raises(UsageError, match=r"^Parameter 'y' is missing$"):
        TAGGED.read({"kind": "b", "x": "1"})
    with pytest.raises(UsageError, match=r"^Parameter 'y' is unexpected$"):
        TAGGED.read({"kind": "a", "x": "1", "y": "1"})


def test_reading_leaves_the_value_alone():
    value = {"id": 1, "big": -1}
    SHAPE.read(value)
    assert value == {"id": 1, "big": -1}
