"""Device sections decoded with a description: what is right, and what is only bounded."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.device.decode import (
    DECODED_STATE_MAX,
    DEPTH_MAX,
    VALUES_MAX,
    decode_device,
    decode_devices,
)
from pyqmigrate.format.device.values import Device, State
from pyqmigrate.format.stream.wire import Section, SectionKind
from tests.harness.device_twin import encode, fields_of
from tests.harness.stream_builders import Sparse

Description = dict[str, Any]


def section(length: int, *, name: str = "dev", at: int = 100, number: int = 7) -> Section:
    return Section(SectionKind.FULL, number, name, 0, 1, at - 20, length + 25, at, length)


def field(name: str, kind: str, size: int, **more: Any) -> Description:
    return {"name": name, "type": kind, "size": size, **more}


def vmsd(*fields: Description, name: str = "dev", subsections: Any = None) -> Description:
    described: Description = {"vmsd_name": name, "version": 1, "fields": list(fields)}
    return described if subsections is None else described | {"subsections": subsections}


def decode(body: bytes, *fields: Description, subsections: Any = None) -> Device:
    return decode_device(section(len(body)), body, vmsd(*fields, subsections=subsections))


def subsection(name: str, body: bytes, version: int = 1) -> bytes:
    return bytes([5, len(name)]) + name.encode() + struct.pack(">I", version) + body


@pytest.mark.parametrize(
    ("kind", "body", "value"),
    [
        ("uint8", b"\xff", 255),
        ("int8", b"\xff", -1),
        ("uint16", b"\x12\x34", 0x1234),
        ("int16", b"\xff\xfe", -2),
        ("uint32", b"\x12\x34\x56\x78", 0x12345678),
        ("int32", b"\xff\xff\xff\xff", -1),
        ("int32 le", b"\0\0\1\0", 256),
        ("uint32 equal", b"\0\0\0\3", 3),
        ("uint64", b"\x80" + bytes(7), 1 << 63),
        ("int64", b"\xff" * 8, -1),
        ("timer", b"\xff" * 8, -1),
        ("bool", b"\1", True),
        ("bool", b"\0", False),
        ("CPU_Double_U", b"\x3f\xf0" + bytes(6), 0x3FF0 << 48),
        ("buffer", b"abc", b"abc"),
        ("pci config", b"\x86\x80\x00\x70", b"\x86\x80\x00\x70"),
        ("pci irq state", bytes(7) + b"\1" + bytes(8), (0, 1, 0, 0)),
        ("cpsr", b"\0\0\3\xc5", 0x3C5),
        ("powered_off", b"\1", True),
        ("nullptr", b"0", None),
        ("uint64", b"0", None),
    ],
)
def test_value_has_the_meaning_of_its_type(kind: str, body: bytes, value: object) -> None:
    device = decode(body, field("x", kind, len(body)))
    assert device.state["x"] == value
    assert type(device.state["x"]) is type(value)
    assert device.explained
    assert not device.state.fields[0].opaque


def test_bool_that_is_neither_is_a_number() -> None:
    assert decode(b"\7", field("x", "bool", 1)).state["x"] == 7


def test_bits_of_a_bitmap_are_in_the_order_of_their_numbers() -> None:
    body = struct.pack(">QQ", 1 << 63 | 1 << 9, 1)
    value = decode(body, field("x", "bitmap", 16)).state["x"]
    assert isinstance(value, bytes)
    assert [bit for bit in range(128) if value[bit // 8] >> bit % 8 & 1] == [9, 63, 64]


def test_unknown_type_is_opaque_bytes() -> None:
    device = decode(b"abcd", field("x", "virtio", 4))
    assert device.state["x"] == b"abcd"
    assert device.state.fields[0].opaque
    assert device.explained


def test_number_of_a_strange_size_is_opaque() -> None:
    device = decode(b"abc", field("x", "uint32", 3))
    assert (device.state["x"], device.state.fields[0].opaque) == (b"abc", True)


def test_array_of_numbers_is_a_tuple() -> None:
    body = struct.pack(">3Hb", 1, 2, 3, -4)
    device = decode(body, field("x", "uint16", 2, array_len=3), field("y", "int8", 1))
    assert (device.state["x"], device.state["y"]) == ((1, 2, 3), -4)
    assert [(f.offset, f.length) for f in device.state.fields] == [(0, 6), (6, 1)]


def test_array_of_bytes_is_bytes() -> None:
    assert decode(b"abc", field("x", "uint8", 1, array_len=3)).state["x"] == b"abc"


def test_elements_listed_singly_keep_their_index() -> None:
    device = decode(b"\1\2", field("x", "uint8", 1, index=0), field("x", "uint8", 1, index=1))
    assert [f.label for f in device.state.fields] == ["x[0]", "x[1]"]


def test_array_of_structs_is_a_tuple_of_states() -> None:
    inner = vmsd(field("a", "uint8", 1), field("b", "uint16", 2), name="pair")
    device = decode(b"\1\0\2\3\0\4", field("x", "struct", 3, array_len=2, struct=inner))
    pairs = device.state["x"]
    assert isinstance(pairs, tuple)
    assert [(s["a"], s["b"]) for s in pairs if isinstance(s, State)] == [(1, 2), (3, 4)]


def test_fields_beside_a_field_are_those_of_a_struct() -> None:
    tmp = field("x", "tmp", 2, vmsd_name="t", version=0, fields=[field("a", "uint16", 2)])
    value = decode(b"\1\2", tmp).state["x"]
    assert isinstance(value, State)
    assert (value.name, value["a"]) == ("t", 0x0102)


def test_subsection_is_found_by_its_name() -> None:
    body = b"\1" + subsection("dev/more", b"\2", 3)
    more = vmsd(field("b", "uint8", 1), name="dev/more") | {"version": 3}
    device = decode(body, field("a", "uint8", 1), subsections=[more])
    found = device.state.subsection("dev/more")
    assert found is not None
    assert (found["b"], found.version, found.offset, found.length) == (2, 3, 1, len(body) - 1)
    assert device.state.subsection("dev/less") is None


def test_subsection_of_a_struct_belongs_to_its_size() -> None:
    sub = subsection("in/more", b"\7")
    inner = vmsd(
        field("a", "uint8", 1),
        name="in",
        subsections=[vmsd(field("b", "uint8", 1), name="in/more")],
    )
    device = decode(
        b"\1" + sub + b"\2",
        field("s", "struct", 1 + len(sub), struct=inner),
        field("z", "uint8", 1),
    )
    assert device.explained
    assert device.state["z"] == 2


def test_subsection_that_is_not_there_leaves_bytes() -> None:
    more = vmsd(field("b", "uint8", 1), name="dev/more")
    body = b"\1" + subsection("dev/less", b"\2")
    device = decode(body, field("a", "uint8", 1), subsections=[more])
    assert not device.explained
    assert device.state["a"] == 1
    assert device.state.fields[1].value == body[1:]
    assert device.state.fields[1].opaque


@pytest.mark.parametrize("kind", ["qtailq", "qlist"])
def test_list_has_an_element_for_each_mark(kind: str) -> None:
    body = b"\1\0\5\1\0\6\0"
    device = decode(body, field("x", kind, 7, **vmsd(field("a", "uint16", 2))))
    elements = device.state["x"]
    assert isinstance(elements, tuple)
    assert [s["a"] for s in elements if isinstance(s, State)] == [5, 6]


def test_empty_lists_have_no_elements() -> None:
    device = decode(bytes(6), field("x", "qtailq", 1), field("y", "gtree", 5))
    assert (device.state["x"], device.state["y"]) == ((), ())
    assert device.explained


def test_list_of_unequal_elements_is_opaque() -> None:
    body = b"\1\0\5\1\6\0"
    device = decode(body, field("x", "qtailq", 6, **vmsd(field("a", "uint16", 2))))
    assert (device.state["x"], device.state.fields[0].opaque) == (body, True)
    assert device.explained


def test_tree_has_keys_and_values() -> None:
    body = struct.pack(">IBQHBQHB", 2, 1, 10, 100, 1, 20, 200, 0)
    device = decode(body, field("x", "gtree", len(body), **vmsd(field("a", "uint16", 2))))
    nodes = device.state["x"]
    assert isinstance(nodes, tuple)
    assert [(s["key"], s["a"]) for s in nodes if isinstance(s, State)] == [
        (struct.pack(">Q", 10), 100),
        (struct.pack(">Q", 20), 200),
    ]


def test_array_of_unequal_elements_keeps_what_is_before_it() -> None:
    inner = vmsd(field("a", "buffer", 4))
    body = b"\0\5" + b"abcd" + b"ab" + b"\7"
    device = decode(
        body,
        field("n", "uint16", 2),
        field("x", "struct", 4, array_len=2, struct=inner),
        field("z", "uint8", 1),
    )
    assert not device.explained
    assert device.state["n"] == 5
    assert [f.value for f in device.state.fields[1:]] == [body[2:]]


def test_body_longer_than_described_ends_with_bytes() -> None:
    device = decode(b"\1rest", field("a", "uint8", 1))
    assert [f.value for f in device.state.fields] == [1, b"rest"]
    assert not device.explained


def test_section_without_description_is_one_opaque_field() -> None:
    device = decode_device(section(3), b"abc", None)
    assert [(f.value, f.opaque) for f in device.state.fields] == [(b"abc", True)]
    assert not device.described


def test_structs_too_deep_are_opaque() -> None:
    inner = vmsd(field("leaf", "uint8", 1))
    for _ in range(2000):
        inner = vmsd(field("s", "struct", 1, struct=inner))
    device = decode_device(section(1), b"\1", inner)
    fields = fields_of(device)
    assert len(fields) == DEPTH_MAX + 1
    assert (fields[-1].value, fields[-1].opaque) == (b"\1", True)


@pytest.mark.parametrize("size", [0, 1])
def test_arrays_that_would_multiply_are_opaque(size: int) -> None:
    inner = vmsd(*(field(f"f{n}", "uint8", 0) for n in range(1000)))
    for _ in range(8):
        inner = vmsd(field("s", "struct", size, array_len=1 << 40, struct=inner))
    device = decode_device(section(4096), bytes(4096), inner)
    assert len(fields_of(device)) < 20000


def test_fields_beyond_what_a_section_can_have_are_opaque() -> None:
    device = decode(b"abc", *(field(f"f{n}", "uint8", 0) for n in range(5000)))
    assert [(f.value, f.opaque) for f in fields_of(device)] == [(b"abc", True)]
    assert not device.explained


def test_values_of_all_sections_together_are_bounded() -> None:
    class Stream:
        sections = (section(0),) * (VALUES_MAX // 1000 + 1)
        description: Description | None = None

    stream = Stream()
    entry = vmsd(*[field("x", "uint8", 0)] * 1000) | {"name": "dev", "instance_id": 0}
    stream.description = {"devices": [entry]}
    decoded = decode_devices(Sparse([(100, b"")]), stream)
    assert len(next(decoded).state.fields) == 1000
    with pytest.raises(NotSupported, match=f"more than {VALUES_MAX} values; choose"):
        list(decoded)


def test_only_the_bodies_that_are_asked_for_are_read() -> None:
    class Stream:
        sections = (section(1000), section(50, name="other", at=5000, number=8))
        description = None

    source = Sparse([(100, b"x" * 1000), (5000, b"y" * 50)])
    [device] = decode_devices(source, Stream(), name="other")
    assert device.state.fields[0].value == b"y" * 50
    assert source.bytes_read == 50
    [device] = decode_devices(source, Stream(), section_id=7)
    assert device.name == "dev"


def test_long_bodies_can_be_left_out() -> None:
    class Stream:
        sections = (section(1000), section(50, name="other", at=5000, number=8))
        description = None

    source = Sparse([(100, b"x" * 1000), (5000, b"y" * 50)])
    assert [d.name for d in decode_devices(source, Stream(), longest=999)] == ["other"]
    assert source.bytes_read == 50


def test_file_that_became_shorter_is_an_error() -> None:
    class Stream:
        sections = (section(1000),)
        description = None

    with pytest.raises(SnapshotError, match="truncated") as caught:
        list(decode_devices(Sparse([(100, b"x" * 10)]), Stream()))
    assert caught.value.offset == 110


def test_too_much_device_state_is_refused_before_it_is_read() -> None:
    class Stream:
        sections = (section(DECODED_STATE_MAX + 1),)
        description = None

    with pytest.raises(NotSupported):
        list(decode_devices(Sparse([], DECODED_STATE_MAX * 2), Stream()))


_SIZES = {"uint8": 1, "int16": 2, "uint32": 4, "int64": 8, "bool": 1, "timer": 8}


@st.composite
def described_bytes(draw: st.DrawFn, depth: int = 0) -> tuple[Description, bytes]:
    """A description as QEMU writes it, and a body that it fits."""
    fields, parts = [], []
    for number in range(draw(st.integers(0, 4))):
        name = f"f{number}"
        shape = draw(st.sampled_from(["number", "buffer", "own", "struct", "structs", "list"]))
        if shape == "number":
            kind, count = draw(st.sampled_from([*_SIZES])), draw(st.integers(0, 5))
            body = draw(
                st.binary(
                    min_size=_SIZES[kind] * (count or 1), max_size=_SIZES[kind] * (count or 1)
                )
            )
            more = {"array_len": count} if count else {}
            fields.append(field(name, kind, _SIZES[kind], **more))
        elif shape in ("buffer", "own") or depth == 3:
            body = draw(st.binary(max_size=9))
            fields.append(field(name, "buffer" if shape == "buffer" else "msix state", len(body)))
        else:
            inner, body = draw(described_bytes(depth + 1))
            count = draw(st.integers(1, 3))
            if shape == "list":
                body = b"".join([b"\1" + body] * count) + b"\0"
                fields.append(field(name, "qtailq", len(body), **inner))
            elif shape == "structs":
                fields.append(field(name, "struct", len(body), array_len=count, struct=inner))
                body *= count
            else:
                fields.append(field(name, "struct", len(body), struct=inner))
        parts.append(body)
    subsections = []
    for number in range(draw(st.integers(0, 1 if depth < 3 else 0))):
        inner, body = draw(described_bytes(depth + 1))
        inner["vmsd_name"] = f"sub{depth}.{number}"
        subsections.append(inner)
        parts.append(subsection(inner["vmsd_name"], body))
    return vmsd(*fields, subsections=subsections), b"".join(parts)


@given(described_bytes())
def test_every_byte_of_a_described_body_is_in_the_tree(made: tuple[Description, bytes]) -> None:
    described, body = made
    device = decode_device(section(len(body)), body, described)
    assert device.explained
    assert encode(device.state) == body
    assert all(not f.opaque or f.type == "msix state" for f in fields_of(device))


_NUMBERS = st.one_of(st.integers(0, 9), st.sampled_from([-1, 1 << 31, 1 << 62, 1 << 64, 1 << 200]))
_KINDS = st.sampled_from(
    [
        "struct",
        "tmp",
        "qtailq",
        "qlist",
        "gtree",
        "uint8",
        "uint64",
        "bool",
        "bitmap",
        "buffer",
        "timer",
        "nullptr",
        "virtio",
        "pci irq state",
        "int32 le",
        "",
    ]
)
_ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, st.text(max_size=3), st.floats()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


def _hostile_state(fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    listed = st.lists(fields, max_size=4)
    return st.fixed_dictionaries(
        {"fields": st.one_of(listed, listed, _ANYTHING)},
        optional={
            "subsections": listed,
            "vmsd_name": st.sampled_from(["", "a", "\ud800"]),
            "version": _NUMBERS,
        },
    )


_HOSTILE_FIELD = st.recursive(
    _ANYTHING,
    lambda inner: st.fixed_dictionaries(
        {"size": st.one_of(_NUMBERS, _NUMBERS, _ANYTHING), "type": _KINDS},
        optional={
            "name": st.one_of(st.text(max_size=2), _ANYTHING),
            "array_len": _NUMBERS,
            "index": _ANYTHING,
            "struct": _hostile_state(inner),
            "fields": st.lists(inner, max_size=3),
            "vmsd_name": st.text(max_size=1),
            "version": _NUMBERS,
            "subsections": st.lists(inner, max_size=2),
        },
    ),
    max_leaves=12,
)


@example({"fields": [{"size": 0, "type": "qtailq", "array_len": 0}]}, b"")
@settings(max_examples=200, deadline=None)
@given(_hostile_state(_HOSTILE_FIELD), st.one_of(st.binary(max_size=40), st.binary(max_size=9)))
def test_no_description_makes_the_decoder_fail_or_lose_bytes(
    described: Description, body: bytes
) -> None:
    device = decode_device(section(len(body)), body, described)
    assert encode(device.state) == body


@settings(max_examples=200, deadline=None)
@given(described_bytes(), st.data())
def test_no_body_makes_the_decoder_fail_or_lose_bytes(
    made: tuple[Description, bytes], data: st.DataObject
) -> None:
    described, body = made
    cut = data.draw(st.integers(0, len(body)))
    changed = body[:cut] + data.draw(st.binary(max_size=12)) + body[cut:]
    device = decode_device(section(len(changed)), changed, described)
    assert encode(device.state) == changed


@settings(max_examples=100, deadline=None)
@given(_ANYTHING)
def test_any_description_of_a_stream_is_survived(description: object) -> None:
    class Stream:
        sections = (section(3),)

    stream = Stream()
    stream.description = {"devices": description}  # type: ignore[attr-defined]
    [device] = decode_devices(Sparse([(100, b"abc")]), stream)  # type: ignore[arg-type]
    assert encode(device.state) == b"abc"
