import itertools
import json
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyqmigrate.qmp.json_stream import JsonError, JsonStream, JsonValue, encode_line


def read(data, **limits):
    return list(JsonStream(**limits).feed(data))


def read_in_slices(data, cuts, **limits):
    stream = JsonStream(**limits)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [
        item for begin, end in itertools.pairwise(edges) for item in stream.feed(data[begin:end])
    ]


def values(data):
    items = read(data)
    assert all(isinstance(item, JsonValue) for item in items), items
    return [item.value for item in items]


def errors(data, **limits):
    """The texts of the errors, with an ellipsis for each value in between."""
    return [
        item.text.removeprefix("JSON parse error, ") if isinstance(item, JsonError) else ...
        for item in read(data, **limits)
    ]


def test_several_values_come_from_one_slice_without_newlines():
    assert values(b'{"a":1}{"b":2} [3]') == [{"a": 1}, {"b": 2}, [3]]


def test_a_value_is_given_as_soon_as_its_last_byte_is_there():
    stream = JsonStream()
    assert list(stream.feed(b'{"a":[1,2')) == []
    assert list(stream.feed(b"]}")) == [({"a": [1, 2]}, 11)]


def test_positions_count_the_bytes_of_the_whole_stream():
    stream = JsonStream()
    assert [item.end for item in stream.feed(b'{} "x"[]{')] == [2, 6, 8]
    assert [item.end for item in stream.feed(b"}\r\n@")] == [10, 13]


def test_a_bare_number_or_keyword_is_known_by_the_byte_after_it():
    stream = JsonStream()
    assert list(stream.feed(b"12")) == []
    assert list(stream.feed(b" true")) == [(12, 3)]
    assert list(stream.feed(b",")) == [(True, 8), ("JSON parse error, expecting value", 8)]


def test_single_quotes_serve_as_double_ones():
    assert values(b"""{'a':'say "x"', 'b':'it\\'s', "c":"it's \\'"}""") == [
        {"a": 'say "x"', "b": "it's", "c": "it's '"}
    ]


def test_blank_lines_and_carriage_returns_are_ignored():
    assert values(b"\r\n\r\n \t{}\r\n\r\n") == [{}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (rb'"\b\f\n\r\t\"\\\/"', '\b\f\n\r\t"\\/'),
        (rb'"\u00e9\u00E9"', "éé"),
        (rb'"\ud83d\ude00"', "😀"),
        (rb'"\u0000"', "\0"),
        (b'"\xc0\x80"', "\0"),
        (rb'"\\u00e9\\\\n"', "\\u00e9\\\\n"),
        (rb"'\\\'\"'", "\\'\""),
        ('"é😀\x7f"'.encode(), "é😀\x7f"),
    ],
)
def test_strings_are_decoded(text, value):
    assert values(text) == [value]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"0", 0),
        (b"-0", 0),
        (b"-12", -12),
        (b"1.5", 1.5),
        (b"1e2", 100.0),
        (b"0e1", 0.0),
        (b"1E+2", 100.0),
        (b"18446744073709551615", 2**64 - 1),
        (b"-9223372036854775808", -(2**63)),
    ],
)
def test_numbers_keep_their_kind(text, value):
    [read_value] = values(text + b" ")
    assert (read_value, type(read_value)) == (value, type(value))


def test_integers_beyond_64_bits_become_floats():
    assert values(b"18446744073709551616 -9223372036854775809 ") == [2.0**64, -(2.0**63)]
    assert values(b"1" + b"0" * 5000 + b" ") == [sys.float_info.max]
    assert values(b"-1e999 ") == [-sys.float_info.max]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"}", ["expecting value"]),
        (b",:", ["expecting value", "expecting value"]),
        (b"nope ", ["invalid keyword 'nope'"]),
        (b"{nope:1}", ["invalid keyword 'nope'"]),
        (b"{1:2}", ["key is not a string in object"]),
        (b"{[1]:2}", ["key is not a string in object"]),
        (b'{{"a":1}:2}', ["key is not a string in object"]),
        (b'{"a" 1}', ["missing : in object pair"]),
        (b'{"a"}', ["missing : in object pair"]),
        (b'{"a":1 "b":2}', ["expected separator in dict"]),
        (b'{"a":1]', ["expected separator in dict"]),
        (b'{"a":1,}', ["expecting value"]),
        (b'{"a":}', ["expecting value"]),
        (b"{,}", ["expecting value"]),
        (b"{]", ["expecting value"]),
        (b"{[}]", ["expecting value"]),
        (b"[1 2]", ["expected separator in list"]),
        (b"[1}]", ["expected separator in list", "expecting value"]),
        (b"[1,]", ["expecting value"]),
        (b'{"a":1,"a":2}', ["duplicate key"]),
        (b'{"a":[{"b":1,"b":2}]}{}', ["duplicate key", ...]),
        (b"@", ["stray '@'"]),
        (b'{"a":@}', ["stray '@'", "expecting value"]),
        (b"01\n", ["stray '01'"]),
        (b"-x,", ["stray '-x'", "expecting value"]),
        (b"1.\n{}", ["stray '1.\n'", ...]),
        (b"1e+x\n", ["stray '1e+x'"]),
        (b"+1\n", ["stray '+'"]),
        (b"1-2 ", [..., ...]),
        (b'true"a"', [..., ...]),
        (b"tRue\n", ["invalid keyword 't'", "stray 'R'"]),
        (b'{"a":"b\tc"}', ["stray '\"b\t'", "expecting value"]),
        (b'"a\x00b"\n', ["stray '\"a'"]),
        (b'"a\\\x01"\n', ["stray '\"a\\\x01'"]),
        (b"%d\n# x\n", ["stray '%'", "stray '#'"]),
        (b'"\xc3"', ["invalid UTF-8 sequence in string"]),
        (b'"\xed\xa0\x80"', ["invalid UTF-8 sequence in string"]),
        (b'"\xef\xbf\xbf"', ["invalid UTF-8 sequence in string"]),
        (b'"\xc3\\x"', ["invalid UTF-8 sequence in string"]),
        (b'"\\x\xc3"', ["invalid escape sequence in string"]),
        (b'"\\a"', ["invalid escape sequence in string"]),
        (b'"\\ud83d"', ["\\ud83d is not a valid Unicode character"]),
        (b'"\\ud83d\\u0041"', ["\\ud83d is not a valid Unicode character"]),
        (b'"\\ude00"', ["\\ude00 is not a valid Unicode character"]),
        (b'"\\uFFFE"', ["\\uFFFE is not a valid Unicode character"]),
        (b'"\\ufdd0"', ["\\ufdd0 is not a valid Unicode character"]),
        (b'"\\ud83f\\udfff"', ["\\ud83f is not a valid Unicode character"]),
        (b'"\\u12"', ['\\u12" is not a valid Unicode character']),
        (b"'\\u1'", ["\\u1' is not a valid Unicode character"]),
        (b'"\\uzzzz"', ["\\uzzzz is not a valid Unicode character"]),
    ],
)
def test_what_is_wrong_is_said_in_qemus_words(text, expected):
    assert errors(text) == expected


@pytest.mark.parametrize("cut", [b'{"a":[1,', b'{"abc', b"{'abc", b"[[[tr", b'{"a":-', b'"\\'])
def test_0xff_ends_whatever_was_begun_with_one_error(cut):
    [error, value] = read(cut + b"\xff\n{}")
    assert isinstance(error, JsonError)
    assert error.text.startswith("JSON parse error, stray '")
    assert value.value == {}


def test_an_unterminated_object_swallows_what_follows():
    assert read(b'{"a":1 {"b":2}\n{"c":3}\n') == []


def test_a_malformed_message_ends_where_its_brackets_close():
    assert errors(b'{"a" [1, {"b": 2}], 3}{}') == ["missing : in object pair", ...]


def test_nesting_up_to_the_limit_is_read():
    [value] = values(b"[" * 1024 + b"]" * 1024)
    depth = 1
    while value:
        [value] = value
        depth += 1
    assert depth == 1024


def test_deeper_nesting_is_an_error_at_the_bracket_that_is_too_much():
    stream = JsonStream()
    assert list(stream.feed(b'{"a":' * 1024)) == []
    assert list(stream.feed(b"{")) == [("JSON nesting depth limit exceeded", 5 * 1024 + 1)]
    assert list(stream.feed(b"{}")) == [({}, 5 * 1024 + 3)]


def test_a_message_over_the_size_limit_is_an_error_and_the_next_one_is_read():
    assert errors(b'{"a":"' + b"x" * 90 + b'","b":1}', message_limit=100)[0] == (
        "JSON token size limit exceeded"
    )
    assert errors(b'{"a":"xyz"}' * 50, message_limit=100) == [...] * 50


def test_a_message_of_too_many_tokens_is_an_error():
    assert errors(b"[1,2,3,4,5]{}", token_limit=8)[0] == "JSON token count limit exceeded"


def test_a_token_over_the_limit_is_not_gathered():
    stream = JsonStream(message_limit=1000)
    found = [item for _ in range(100) for item in stream.feed(b"x" * 100)]
    assert {item.text for item in found} == {"JSON token size limit exceeded"}
    assert len(found) == 100 * 100 // 1001


ALPHABET = [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b'"a"',
    b'"b"',
    b"'c'",
    b"1",
    b"-",
    b"0",
    b".5",
    b"e",
    b"+",
    b"true",
    b"null",
    b"nope",
    b"T",
    b"@",
    b"\n",
    b"\t",
    b" ",
    b"\xff",
    b"\xfe",
    b"\\",
    b'"',
    b"'",
    b"\xc3\xa9",
    b"\xc3",
    b"\x00",
    b"\x01",
    b"\x7f",
    b"\\u12",
    b'"\\u00e9"',
    b'"\\ud83d\\ude00"',
    b'{"a":1}',
    b'"\xc0\x80"',
    b"1.0e5",
    b"xxxxxxxxxx",
    b"11111111111",
]
CUTS = st.lists(st.integers(0, 10**6), max_size=8)
JUNK = st.lists(st.sampled_from(ALPHABET), max_size=60).map(b"".join) | st.binary(max_size=80)


@given(JUNK, CUTS, st.sampled_from([7, 12, 10**6]))
@settings(max_examples=400, deadline=None)
@example(b'"' + b"x" * 10 + b'"', list(range(1, 13)), 12)
@example(b'"' + b"x" * 11 + b'"', list(range(1, 13)), 12)
@example(b'"' + b"x" * 10 + b"\\n" + b'"', list(range(1, 14)), 12)
def test_any_slicing_gives_the_same_items_at_the_same_positions(data, cuts, message_limit):
    limits = {"message_limit": message_limit, "depth_limit": 5, "token_limit": 20}
    whole = read(data, **limits)
    assert read_in_slices(data, cuts, **limits) == whole
    assert read_in_slices(data, range(len(data)), **limits) == whole


@given(JUNK)
@settings(max_examples=200, deadline=None)
def test_0xff_and_a_newline_always_make_a_fresh_start(data):
    assert read(data + b'\xff\n{"a":1}')[-1].value == {"a": 1}


TEXT = st.text(
    st.characters(
        exclude_categories=["Cs"],
        exclude_characters=[chr(code) for code in range(0xFDD0, 0xFDF0)]
        + [chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)],
    )
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=30,
)


@given(JSON, st.booleans(), st.sampled_from([None, 1]), CUTS)
@settings(max_examples=300, deadline=None)
def test_valid_json_reads_as_the_standard_module_reads_it(value, ascii_only, indent, cuts):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode() + b"\n"
    [item] = read_in_slices(text, cuts)
    assert item.value == json.loads(text)


@given(JSON)
@settings(deadline=None)
def test_a_written_line_is_ascii_and_reads_back(value):
    line = encode_line(value)
    assert line.isascii()
    assert line.endswith(b"\r\n")
    assert b"\n" not in line[:-2]
    assert json.loads(line) == value
    assert read(line)[0].value == value


def test_what_is_not_ascii_is_written_with_upper_case_hex():
    assert encode_line("é\\u00e9 \x7f\x1f😀\n") == (
        b'"\\u00E9\\\\u00e9 \\u007F\\u001F\\uD83D\\uDE00\\n"\r\n'
    )


def test_half_a_surrogate_pair_is_written_as_the_replacement_character():
    assert encode_line("a\udcff\ud83d") == b'"a\\uFFFD\\uFFFD"\r\n'


@given(st.lists(st.sampled_from(["\\", "\\ud83d", "\\u00e9", "u", "é", "\x1f", "😀", '"'])))
@example(["\\ud83d"])
def test_a_text_that_looks_like_escapes_comes_through_a_line(pieces):
    text = "".join(pieces)
    assert json.loads(encode_line(text)) == text


def test_a_text_that_is_all_escapes_keeps_its_pairs_together():
    for shift in range(3):
        text = "é" * shift + "😀" * 10_000
        assert json.loads(encode_line(text)) == text


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_json_cannot_say_is_not_written(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_line(value)


def test_what_was_nested_as_deep_as_allowed_is_written_back():
    deep = b'{"a": [true, ' * 511 + b'"\xc3\xa9"' + b", null, {}]}" * 511
    [item] = read(deep)
    line = encode_line(item.value)
    assert line == deep.replace(b"\xc3\xa9", b"\\u00E9") + b"\r\n"


# What QEMU 11.1.3 answers to these.
POSITIONS = [
    (b"@", ["1:1: stray '@'"]),
    (b"{} [1,\n2,\n nope\n]", [..., "3:2: invalid keyword 'nope'"]),
    (b'{"a":1,\n"b" 2\n}', ["2:5: expecting ':'"]),
    (
        b'{nope}{"a":1,}{1:2}{,}',
        ["1:2: expecting key", "1:14: expecting key", "1:16: expecting key", "1:21: expecting key"],
    ),
    (b"[1 2][1,]", ["1:4: expected ',' or ']'", "1:9: expecting value"]),
    (b'{"a":1 "b"}', ["1:8: expected ',' or '}'"]),
    (b'{"a":1,"a":[1,2]}', ["1:17: duplicate key"]),
    # A byte that ended what came before it counts for the column.
    (b"5nope ", [..., "1:3: invalid keyword 'nope'"]),
    (b"[1,@,2]", ["1:4: stray '@'", "1:6: expecting value", ..., "1:8: expecting value"]),
    # The first error of a value stays the only one.
    (b"[1 2 @", ["1:4: expected ',' or ']'"]),
    (b"[nope, nope, 1 2]", ["1:2: invalid keyword 'nope'"]),
]


@pytest.mark.parametrize(("data", "said"), POSITIONS)
@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 99), max_size=4))
def test_errors_with_positions_are_those_of_qemu_11(data, said, cuts):
    got = [
        item.text.replace("JSON parse error, ", "") if isinstance(item, JsonError) else ...
        for item in read_in_slices(data, cuts, positions=True)
    ]
    assert got == said


def test_with_positions_the_rest_of_a_value_over_a_limit_is_skipped():
    stream = JsonStream(depth_limit=3, positions=True)
    assert [item.text for item in stream.feed(b"[[[[")] == ["JSON nesting depth limit exceeded"]
    assert list(stream.feed(b"[nope]]]]")) == []
    assert [item.value for item in stream.feed(b"] 7 ")] == [7]
