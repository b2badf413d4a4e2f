"""The head of an ELF core, read back by pyelftools; the header of a LiME range."""

from __future__ import annotations

import io

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import NotSupported, SnapshotError
from pyqmigrate.format.dump import lime
from pyqmigrate.format.dump.elf import SEGMENTS_MAX, Segment, encode_head, encode_note, head_length
from tests.harness.examples import some

words = st.integers(0, (1 << 64) - 1)
segments = st.lists(st.builds(Segment, words, words, words), max_size=20)
notes = st.lists(
    st.tuples(
        st.text("ABCQEMU", max_size=12), st.integers(0, (1 << 32) - 1), st.binary(max_size=50)
    ),
    max_size=5,
)


@some
@given(segments, notes, st.booleans(), st.sampled_from([0, 21, 62, 183]))
def test_readers_find_what_was_encoded(
    segments: list[Segment], notes: list[tuple[str, int, bytes]], big: bool, machine: int
) -> None:
    encoded = [encode_note(*note, big_endian=big) for note in notes]
    head = encode_head(machine, segments, b"".join(encoded), big_endian=big)
    assert len(head) == head_length(len(segments), sum(map(len, encoded)))
    elf = ELFFile(io.BytesIO(head))
    assert (elf.elfclass, elf.little_endian, elf["e_type"]) == (64, not big, "ET_CORE")
    assert elf.header.e_ehsize == 64
    first, *loads = elf.iter_segments()
    assert first.header.p_type == "PT_NOTE"
    assert first.data() == b"".join(encoded)
    found = [(s.header.p_paddr, s.header.p_offset, s.header.p_filesz) for s in loads]
    assert found == [(s.address, s.position, s.length) for s in segments]
    assert {s.header.p_align for s in loads} <= {0}


@pytest.mark.parametrize("big", [False, True])
def test_notes_have_their_names_kinds_and_contents(big: bool) -> None:
    content = encode_note("CORE", 1, b"12345", big_endian=big)
    words = [(5, 5, 1)[n].to_bytes(4, "big" if big else "little") for n in range(3)]
    assert content == b"".join(words) + b"CORE\0\0\0\0" + b"12345\0\0\0"


def test_more_segments_than_the_format_counts_are_refused() -> None:
    assert head_length(SEGMENTS_MAX, 0) == 64 + 56 * 65534
    with pytest.raises(NotSupported, match="65534 ranges"):
        head_length(SEGMENTS_MAX + 1, 0)


@some
@given(st.integers(0, (1 << 64) - 1), st.data())
def test_lime_header_comes_back(address: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, (1 << 64) - address))
    header = lime.encode_header(address, length)
    assert len(header) == lime.HEADER_LENGTH == 32
    assert header[:4] == b"EMiL"
    assert lime.decode_header(header) == (address, length)


@some
@given(st.binary(max_size=40))
def test_what_is_not_a_lime_header_is_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError):
        lime.decode_header(data)
