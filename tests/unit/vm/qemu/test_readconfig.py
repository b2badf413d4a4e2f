"""Options as the text of a -readconfig file, and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.vm.qemu.command_line import CommandLine, Option
from pyqmigrate.vm.qemu.readconfig import as_configuration, with_configurations

_KEYS = st.text("abcdefghij-_", min_size=1, max_size=20).filter(lambda key: key != "id")
_VALUES = st.text(
    st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"'),
    min_size=1,
    max_size=40,
)


@given(_VALUES, _VALUES, st.dictionaries(_KEYS, _VALUES))
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, kind: str, name: str, properties: dict[str, str]
) -> None:
    values = {"qom-type": kind, "id": name, **properties}
    option = Option("object", json.dumps(values))
    text = as_configuration([option, Option("machine", "memory-backend=ram")])
    assert text is not None
    file = tmp_path_factory.mktemp("configuration") / "file"
    file.write_text(text)
    command = CommandLine("qemu", (Option("readconfig", str(file)),))
    read = with_configurations(command).options[1:]
    assert [(option.name, option.properties()) for option in read] == [
        ("object", option.properties("qom-type")),
        ("machine", {"memory-backend": "ram"}),
    ]


def test_json_is_written_as_properties() -> None:
    option = Option(
        "object", '{"qom-type": "memory-backend-ram", "id": "a", "size": 4096, "dump": false}'
    )
    assert as_configuration([option]) == (
        '[object "a"]\n  qom-type = "memory-backend-ram"\n  size = "4096"\n  dump = "off"\n'
    )


@pytest.mark.parametrize(
    "option",
    [
        Option("device", "virtio-rng"),
        Option("object", "memory-backend-ram,id=a"),
        Option("object", json.dumps({"id": 'a"b'})),
        Option("object", json.dumps({"id": "a" * 64})),
        Option("object", json.dumps({"id": "a", "mem-path": "/ä"})),
        Option("object", json.dumps({"id": "a", "mem-path": "/" + "x" * 1000})),
        Option("object", json.dumps({"id": "a", "mem-path": ""})),
        Option("object", json.dumps({"id": "a", "mem-path": "a\nb"})),
        Option("object", json.dumps({"id": "a", "a\nb": "c"})),
        Option("object", json.dumps({"id": "a", "k" * 64: "c"})),
        Option("object", json.dumps({"id": "a", "host-nodes": [0]})),
        Option("S"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_not(option: Option) -> None:
    assert as_configuration([option]) is None
