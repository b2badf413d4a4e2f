"""A description describes the configuration of the stream that carries it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.format.stream.configuration import Configuration, described, encode
from pyqmigrate.format.stream.description import describes_devices, with_configuration
from tests.harness.described_reader import DescribedReader

UUID = bytes(range(16))
CONFIGURATIONS = [
    Configuration(""),
    Configuration("pc-i440fx-10.0", ("mapped-ram",)),
    Configuration("virt-10.0", ("x-ignore-shared", "mapped-ram"), 12, UUID),
    Configuration("none", (), None, UUID),
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_reader_that_knows_the_description_only_reads_the_configuration(
    configuration: Configuration,
) -> None:
    reader = DescribedReader(encode(configuration))
    found = reader.state(described(configuration))
    assert reader.at == len(reader.data)
    assert found["name"] == [configuration.machine.encode()]
    names = found.get("configuration/capabilities", {}).get("capabilities", [])
    assert tuple(names) == configuration.capabilities
    if configuration.uuid:
        assert b"".join(found["configuration/uuid"]["uuid.data"]) == UUID
    if configuration.target_page_bits:
        assert found["configuration/target-page-bits"]["target_page_bits"] == [b"\0\0\0\x0c"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
objects = st.dictionaries(
    st.sampled_from(["configuration", "devices", "page_size", "}", "é"]), values
)


@given(objects, st.sampled_from(CONFIGURATIONS), st.sampled_from([None, 2]), st.booleans())
def test_only_the_configuration_is_another(
    value: dict[str, Any], configuration: Configuration, indent: int | None, plain: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=plain).encode("utf-8", "surrogatepass")
    made = with_configuration(text, configuration)
    ours = described(configuration)
    assert json.loads(made.decode("utf-8", "surrogatepass")) == value | {"configuration": ours}
    assert with_configuration(made, configuration) == made


def test_the_rest_stays_byte_for_byte() -> None:
    text = b' {"a" :1.0,"configuration":{"x": [2] } ,\n"b": "\xc3\xa9" }'
    ours = json.dumps(described(CONFIGURATIONS[1])).encode()
    assert with_configuration(text, CONFIGURATIONS[1]) == text.replace(b'{"x": [2] }', ours)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"17", b'{"a": ', b"\xff{}", b'x{"a": 1}'])
def test_text_that_is_not_an_object_stays(text: bytes) -> None:
    assert with_configuration(text, CONFIGURATIONS[1]) == text


def test_repeated_keys_stay() -> None:
    text = b'{"devices": [{"fields": [1], "fields": [2]}], "devices": []}'
    assert with_configuration(text, CONFIGURATIONS[0]).endswith(text[1:])


def test_lengths_alone_do_not_describe() -> None:
    buffer = {"name": "a", "fields": [{"name": "data", "size": 1, "type": "buffer"}]}
    assert not describes_devices({"devices": [buffer]})
    assert describes_devices({"devices": [buffer, {"name": "b", "vmsd_name": "b", "fields": []}]})
    assert describes_devices({"devices": []})
    assert not describes_devices(None)
    assert not describes_devices({"devices": 3})
