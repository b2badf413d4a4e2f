"""Memory in two layers is what taking each page from its layer gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate import UsageError, _core
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.in_use import FileId
from pyqmigrate.io.layered import buffer_memory, layered
from tests.harness.examples import some

ffi, lib = _core.ffi, _core.lib
PAGE = 1024
NO_FILE = FileId(0, 0)


def pages(letter: bytes, npages: int) -> bytes:
    return b"".join(letter + bytes([k % 256]) * (PAGE - 1) for k in range(npages))


def bitmap_of(bits: list[bool]) -> Bitmap:
    bitmap = Bitmap(len(bits))
    bitmap.fill(
        memoryview(sum(1 << k for k, bit in enumerate(bits) if bit).to_bytes(128, "little"))
    )
    return bitmap


@some
@given(st.lists(st.booleans(), min_size=1, max_size=200), st.data())
def test_each_page_comes_from_its_layer(bits: list[bool], data: st.DataObject) -> None:
    n = len(bits)
    upper, lower = pages(b"u", n), pages(b"l", n)
    memory = layered(
        buffer_memory(upper, NO_FILE), buffer_memory(lower, NO_FILE), bitmap_of(bits), PAGE
    )
    first = data.draw(st.integers(0, n - 1))
    end = data.draw(st.integers(first + 1, n))
    out = ffi.new("char[]", (end - first) * PAGE)
    assert memory.source.fill(memory.source.argument, out, first * PAGE, len(out)) == len(out)
    twin = b"".join(
        (upper if bits[k] else lower)[k * PAGE : (k + 1) * PAGE] for k in range(first, end)
    )
    assert bytes(ffi.buffer(out)) == twin


class Mapped:
    """A block of a mapped-ram file of which only the pages in ``data`` are there."""

    def __init__(self, data: list[bool]) -> None:
        self.bitmap = bitmap_of(data)
        self.core = ffi.new("struct qm_mapped *")
        self.core.data, self.core.npages = self.bitmap.core, len(data)
        self.core.page_size, self.core.fd = PAGE, -1


@some
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1), st.data())
def test_next_data_is_the_first_page_that_its_layer_has(
    rows: list[tuple[bool, bool, bool]], draw: st.DataObject
) -> None:
    in_upper, upper, lower = (list(column) for column in zip(*rows, strict=True))
    above, below, selection = Mapped(upper), Mapped(lower), bitmap_of(in_upper)
    core = ffi.new("struct qm_layered *")
    core.upper, core.npages, core.page_size = selection.core, len(rows), PAGE
    core.upper_fill = core.lower_fill = lib.qm_mapped_fill
    core.upper_next = core.lower_next = lib.qm_mapped_next
    core.upper_arg, core.lower_arg = above.core, below.core
    off = draw.draw(st.integers(0, len(rows) * PAGE - 1))
    end = draw.draw(st.integers(off + 1, len(rows) * PAGE))
    has = [u if up else low for up, u, low in rows]
    if has[off // PAGE]:
        twin = off
    else:
        twin = min([k * PAGE for k in range(off // PAGE, len(rows)) if has[k]] + [end])
    assert lib.qm_layered_next(core, off, end) == min(twin, end)


def test_a_short_layer_is_an_error() -> None:
    core = ffi.new("struct qm_layered *")
    short = ffi.callback("ssize_t (void *, void *, uint64_t, size_t)", lambda *_: 5)
    bits = bitmap_of([True] * 4)
    core.upper, core.npages, core.page_size = bits.core, 4, PAGE
    core.upper_fill = core.lower_fill = short
    out = ffi.new("char[]", 4 * PAGE)
    assert lib.qm_layered_fill(core, out, 0, 4 * PAGE) < 0
    assert lib.qm_layered_fill(core, out, 1, PAGE) < 0
    assert lib.qm_layered_fill(core, out, 4 * PAGE, PAGE) < 0


def test_layers_of_different_lengths_are_refused() -> None:
    one, two = buffer_memory(bytes(PAGE), NO_FILE), buffer_memory(bytes(2 * PAGE), NO_FILE)
    with pytest.raises(UsageError, match="the layers have"):
        layered(one, two, Bitmap(1), PAGE)
    with pytest.raises(UsageError, match="a bitmap of 2 pages"):
        layered(one, one, Bitmap(2), PAGE)
