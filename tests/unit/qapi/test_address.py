import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.qapi.address import Address, Transport, parse_address, parse_uri

FILE = {"transport": "file", "filename": "/x", "offset": 7}
MAIN = {"channel-type": "main", "addr": FILE}
CPR = {"channel-type": "cpr", "addr": FILE}


def refusal(*arguments, **options):
    with pytest.raises(UsageError) as caught:
        parse_address(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("file:/x,offset=1k", Address(Transport.FILE, "/x", 1024)),
        ("fd:name", Address(Transport.FD, "name")),
        ("tcp:host:1", Address(Transport.SOCKET)),
        ("unix:/x", Address(Transport.SOCKET)),
        ("exec:cat", Address(Transport.EXEC)),
        ("rdma:host:1", Address(Transport.RDMA)),
    ],
)
def test_a_uri_gives_its_transport(uri, address):
    assert parse_uri(uri) == address


@pytest.mark.parametrize("uri", ["defer", "", "exec", "FILE:x"])
def test_an_unknown_scheme_is_refused(uri):
    assert refusal(uri) == f"unknown migration protocol: {uri}"


def test_a_main_channel_gives_its_address():
    assert parse_address(None, [MAIN]) == Address(Transport.FILE, "/x", 7)
    named = {"channel-type": "main", "addr": {"transport": "socket", "type": "fd", "str": "n"}}
    assert parse_address(None, [named]) == Address(Transport.FD, "n")


def test_a_path_in_a_channel_may_hold_what_a_uri_cannot():
    entry = {"channel-type": "main", "addr": FILE | {"filename": "/x,offset=1"}}
    assert parse_address(None, [entry]).path == "/x,offset=1"


def test_a_negative_offset_wraps_around():
    entry = {"channel-type": "main", "addr": FILE | {"offset": -1}}
    assert parse_address(None, [entry]).offset == 2**64 - 1


@pytest.mark.parametrize("arguments", [(None,), (None, []), ("file:/x", [MAIN])])
def test_exactly_one_way_to_say_it_is_needed(arguments):
    assert refusal(*arguments) == "need either 'uri' or 'channels' argument"


def test_a_uri_goes_with_an_empty_list():
    assert parse_address("file:/x", []) == Address(Transport.FILE, "/x")


def test_two_main_channels_are_refused():
    assert refusal(None, [MAIN, MAIN]) == "Channel list has more than one main entry"


def test_a_load_takes_one_channel_only():
    expected = "Channel list must have only one entry, for type 'main'"
    assert refusal(None, [MAIN, CPR], incoming=True) == expected


@pytest.mark.parametrize("channels", [[CPR], [MAIN, CPR], [CPR, CPR]])
def test_a_list_that_kills_qemu_or_needs_cpr_is_refused(channels):
    assert "must have one entry, for type 'main'" in refusal(None, channels)


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        (1, "Invalid parameter type for 'channels', expected: array"),
        ([1], "Invalid parameter type for 'channels[0]', expected: object"),
        ([{}], "Parameter 'channels[0].channel-type' is missing"),
        ([MAIN | {"channel-type": "x"}], "Parameter 'channel-type' does not accept value 'x'"),
        ([MAIN | {"addr": {}}], "Parameter 'channels[0].addr.transport' is missing"),
        ([MAIN | {"addr": {"transport": "x"}}], "Parameter 'transport' does not accept value 'x'"),
        (
            [MAIN | {"addr": {"transport": "file", "filename": "/x"}}],
            "Parameter 'channels[0].addr.offset' is missing",
        ),
        (
            [MAIN | {"addr": FILE | {"offset": "0x1000"}}],
            "Parameter 'channels[0].addr.offset' expects uint64",
        ),
        ([MAIN | {"addr": FILE | {"q": 1}}], "Parameter 'channels[0].addr.q' is unexpected"),
        ([MAIN | {"foo": 1}], "Parameter 'channels[0].foo' is unexpected"),
    ],
)
def test_an_ill_formed_list_is_refused_in_qemus_words(channels, text):
    assert refusal(None, channels) == text
