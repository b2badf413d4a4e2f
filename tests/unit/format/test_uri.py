import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import UsageError
from pyqmigrate.format.uri import FileUri, parse_file_uri, parse_size


def test_plain_path_has_offset_zero():
    assert parse_file_uri("file:/snap/guest") == FileUri("/snap/guest", 0)


def test_offset_is_split_off():
    assert parse_file_uri("file:/snap/guest,offset=0x1000") == ("/snap/guest", 4096)


def test_relative_and_empty_paths_are_kept_as_written():
    assert parse_file_uri("file:guest").path == "guest"
    assert parse_file_uri("file:").path == ""


def test_other_commas_belong_to_the_path():
    assert parse_file_uri("file:/t/m,foo=1") == ("/t/m,foo=1", 0)
    assert parse_file_uri("file:/t/m,offset") == ("/t/m,offset", 0)


def test_first_offset_splits_and_nothing_is_escaped():
    with pytest.raises(UsageError, match=r"^file URI has bad offset 1,offset=2: Invalid argument$"):
        parse_file_uri("file:/t/a,offset=1,offset=2")


def test_fdset_name_is_an_ordinary_path_here():
    assert parse_file_uri("file:/dev/fdset/1,offset=4k") == ("/dev/fdset/1", 4096)


@pytest.mark.parametrize("uri", ["FILE:/x", "/x", "tcp:0:1", "defer", "", " file:/x"])
def test_other_schemes_are_refused_in_qemus_words(uri):
    with pytest.raises(UsageError) as refused:
        parse_file_uri(uri)
    assert str(refused.value) == f"unknown migration protocol: {uri}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("27", 27),
        ("0x1b", 27),
        ("0X1B", 27),
        ("010", 10),
        ("00", 0),
        ("1b", 1),
        ("1B", 1),
        ("1k", 2**10),
        ("1K", 2**10),
        ("1m", 2**20),
        ("1g", 2**30),
        ("1t", 2**40),
        ("1p", 2**50),
        ("1e", 2**60),
        ("1E", 2**60),
        ("1.5k", 1536),
        (".5k", 512),
        ("0.1M", 104858),
        ("1.", 1),
        ("1.0", 1),
        ("0.0b", 0),
        (" 1", 1),
        ("\t+1k", 1024),
        ("+0x10", 16),
        ("18446744073709551615", 2**64 - 1),
        ("0xffffffffffffffff", 2**64 - 1),
        ("15.5e", 31 << 59),
        ("1.k", 1024),
        ("+.5k", 512),
        ("1.0b", 1),
        ("0e", 0),
        (".0", 0),
        ("1.99999999999999999999k", 2048),
        ("0.0005k", 1),
        ("\v1", 1),
    ],
)
def test_size_is_read(text, value):
    assert parse_size(text) == value
    assert parse_file_uri(f"file:/x,offset={text}").offset == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x",
        "0x",
        "0x20M",
        "0x10k",
        "1.5",
        "0.5b",
        "1e3",
        "1.5e1",
        "1kb",
        "1 ",
        "1 k",
        ".",
        "k",
        "++1",
        "0x1.8",
        "\uff11",
        "1_000",
        "1,000",
        "-1k",
        "-0k",
        "-1.",
        "-1.0",
        "-0x1",
        "-.5k",
        "-",
        "-.",
        "99999999999999999999k",
        "99999999999999999999.",
        "-1x",
        "0b1",
        "1..k",
        "00x10",
        "+ 1",
        "--1",
    ],
)
def test_ill_formed_size_is_an_invalid_argument(text):
    with pytest.raises(UsageError) as refused:
        parse_file_uri(f"file:/x,offset={text}")
    assert str(refused.value) == f"file URI has bad offset {text}: Invalid argument"


@pytest.mark.parametrize(
    "text",
    [
        "-1",
        "-0",
        " -1",
        "-.8",
        "18446744073709551616",
        "16e",
        "16.0e",
        "15.99999999999999999999e",
        "0x10000000000000000",
        "9" * 50,
        "9" * 5000,
        "0" * 5000 + "9" * 21,
    ],
)
def test_size_out_of_range_says_so(text):
    with pytest.raises(UsageError) as refused:
        parse_file_uri(f"file:/x,offset={text}")
    assert str(refused.value) == f"file URI has bad offset {text}: Numerical result out of range"


def test_bare_size_names_the_text_it_could_not_read():
    with pytest.raises(UsageError, match=r"^bad size 'one': Invalid argument$"):
        parse_size("one")


@given(st.integers(0, 2**64 - 1), st.sampled_from([str, hex]))
def test_every_64_bit_number_reads_back(value, spell):
    assert parse_size(spell(value)) == value


@given(st.integers(0, 15), st.sampled_from("kmgtpe"))
def test_suffix_is_a_power_of_1024_in_either_case(value, suffix):
    expected = value << 10 * (1 + "kmgtpe".index(suffix))
    assert parse_size(f"{value}{suffix}") == parse_size(f"{value}{suffix.upper()}") == expected


@given(st.text())
def test_any_text_is_a_size_or_a_usage_error(text):
    try:
        assert 0 <= parse_size(text) < 2**64
    except UsageError as refused:
        assert repr(text) in str(refused)


@given(st.text().filter(lambda path: ",offset=" not in path), st.integers(0, 2**64 - 1))
def test_any_path_comes_back_with_its_offset(path, offset):
    assert parse_file_uri(f"file:{path},offset={offset}") == (path, offset)
