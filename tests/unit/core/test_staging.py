"""Parts of a block on a stage, and from there in a file, against the twin of the records."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate._core import ffi, lib
from tests.harness import page_records as records
from tests.harness.directories import directory_on_disk
from tests.harness.examples import some
from tests.harness.kernel import (
    AUTO,
    CHUNK,
    EXACT,
    POLICIES,
    Bits,
    Bytes,
    File,
    Transfer,
    new_block,
    new_channel,
    new_job,
    new_policy,
    to_bits,
    to_words,
)
from tests.harness.page_records import Record, stream_of
from tests.harness.strategies import record_lists

NAMES = [b"pc.ram", b"a"]
PAGES_AT = 1 << 20
GAP = 1 << 20


class Staged:
    """Blocks whose pages go to a file by way of one stage, a chunk at a time."""

    def __init__(
        self,
        path: Path,
        npages: list[int],
        page_size: int,
        policy: tuple[int, int, int],
        *,
        direct: bool,
    ) -> None:
        self.page_size, self.npages = page_size, npages
        self.file = File(path)
        self.core_file = self.file.core(direct=direct)
        at, self.blocks = PAGES_AT, []
        for n in npages:
            self.blocks.append(new_block(n * page_size, page_size, at))
            at += -(-n * page_size // GAP) * GAP
        self.file.holes(at)
        self.data = [to_words(np.zeros(n, dtype=bool)) for n in npages]
        self.seen = [to_words(np.zeros(n, dtype=bool)) for n in npages]
        self.policy = new_policy(policy)
        self.job, self.channel = new_job(), new_channel()
        self.fault = ffi.new("struct qm_fault *")
        self.lost = 0
        self._names = [records.Name(name) for name in NAMES]
        self._listed = ffi.new("struct qm_record_block[]", len(npages))
        for block, name, n, seen in zip(self._listed, self._names, npages, self.seen, strict=True):
            block.name, block.len = name.core[0], n * page_size
            block.sink, block.seen = lib.QM_SINK_STAGING, seen
        self.decoder = ffi.gc(
            lib.qm_decoder_create(self._listed, len(npages), page_size, True),
            lib.qm_decoder_destroy,
        )
        words = CHUNK // page_size // 64
        self._memory = np.full(CHUNK + 4096, 0xDD, dtype=np.uint8)
        shift = -self._memory.ctypes.data % 4096
        self._kept = [
            ffi.new("uint64_t[]", words),
            ffi.new("uint64_t[]", words),
            ffi.from_buffer("unsigned char[]", self._memory[shift:]),
        ]
        self.stage = ffi.new("struct qm_staging *")
        self.stage.filled, self.stage.zeroed, self.stage.base = self._kept
        self.on = -1

    def feed(self, data: bytes) -> int:
        used = ffi.new("size_t *")
        while True:
            exact = ffi.new("unsigned char[]", data or b"\0")
            rc = int(lib.qm_decode(self.job, self.decoder, exact, len(data), used, self.fault))
            data = data[used[0] :]
            if rc != 2:
                return rc
            self.turn()

    def turn(self) -> None:
        self.write()
        off = ffi.new("uint64_t *")
        self.on = int(lib.qm_decoder_wants(self.decoder, off))
        stage, block = self.stage, self.blocks[self.on]
        stage.off = off[0] // CHUNK * CHUNK
        stage.len = min(CHUNK, block.len - stage.off)
        stage.fd, stage.at = self.file.fd, block.pages_offset + stage.off
        stage.data = self.data[self.on] + stage.off // self.page_size // 64
        lib.qm_decoder_set_staging(self.decoder, self.on, stage)

    def write(self) -> None:
        if self.on >= 0:
            rc = self.write_stage(self.on)
            assert rc >= 0
            self.lost += rc

    def write_stage(self, block: int) -> int:
        transfer = Transfer(
            self.job,
            self.blocks[block],
            file=self.core_file,
            policy=self.policy,
            data=self.data[block],
        )
        return int(lib.qm_write_staging(transfer.core, self.channel, self.stage, self.fault))

    def content(self, n: int) -> Bytes:
        """What a reader of the file sees: zeros where the bit is clear."""
        block = self.blocks[n]
        raw = self.file.read(block.pages_offset, block.len).copy()
        raw.reshape(-1, self.page_size)[~to_bits(self.data[n], self.npages[n])] = 0
        return raw

    def stale(self, n: int) -> Bits:
        """Clear pages with bytes in the file."""
        block = self.blocks[n]
        pages = self.file.read(block.pages_offset, block.len).reshape(-1, self.page_size)
        found: Bits = pages.any(axis=1) & ~to_bits(self.data[n], self.npages[n])
        return found

    def close(self) -> None:
        self.file.close()


@pytest.fixture
def staged(disk: Path) -> Iterator[Any]:
    made = []

    def make(
        npages: list[int],
        page_size: int = 4096,
        policy: tuple[int, int, int] = EXACT,
        *,
        direct: bool = True,
    ) -> Staged:
        made.append(Staged(disk / f"file{len(made)}", npages, page_size, policy, direct=direct))
        return made[-1]

    yield make
    for one in made:
        one.close()


@some
@given(
    page_size=st.sampled_from([1024, 65536]),
    policy=st.sampled_from(list(POLICIES.values())),
    data=st.data(),
)
def test_file_holds_what_the_twin_says(
    page_size: int, policy: tuple[int, int, int], data: st.DataObject
) -> None:
    npages = [3 * CHUNK // page_size - 5, 7]
    listed = data.draw(record_lists([150, 7], page_size))
    # Records of the first block, near its parts' edges.
    step = (npages[0] - 150) // 2
    listed = [
        Record(r.block, r.number + (step * (i % 3) if r.block == 0 else 0), r.fill, r.page, r.delta)
        for i, r in enumerate(listed)
    ]
    before = [np.zeros(n * page_size, dtype=np.uint8) for n in npages]
    after, seen = records.apply(listed, before, page_size, fresh=True)
    with directory_on_disk() as disk:
        made = Staged(disk / "file", npages, page_size, policy, direct=page_size >= 4096)
        try:
            assert made.feed(stream_of(listed, NAMES[:2], page_size)) == 1
            made.write()
            for n in range(2):
                assert np.array_equal(made.content(n), after[n])
                assert np.array_equal(to_bits(made.seen[n], npages[n]), seen[n])
                full = after[n].reshape(-1, page_size).any(axis=1)
                assert np.array_equal(to_bits(made.data[n], npages[n]), full)
            assert made.lost >= sum(int(made.stale(n).sum()) for n in range(2))
        finally:
            made.close()


def page(number: int, fill: int, size: int = 4096) -> Record:
    return Record(0, number, page=bytes([fill]) * size)


FAR = Record(1, 0, fill=0)  # takes the first block from the stage


def test_change_of_a_later_round_applies_to_what_the_file_has(staged: Any) -> None:
    made = staged([70, 1])
    delta = Record(0, 3, delta=((10, b"\x99"),))
    assert made.feed(stream_of([page(3, 0x41), FAR, delta], NAMES, 4096)) == 1
    made.write()
    expected = bytearray(b"\x41" * 4096)
    expected[10] = 0x99
    assert made.content(0)[3 * 4096 : 4 * 4096].tobytes() == bytes(expected)


def test_change_to_a_page_that_became_zero_applies_to_zeros(staged: Any) -> None:
    made = staged([70, 1])
    listed = [page(3, 0x41), FAR, Record(0, 3, fill=0), Record(0, 3, delta=((10, b"\x99"),))]
    assert made.feed(stream_of(listed, NAMES, 4096)) == 1
    made.write()
    assert made.content(0)[3 * 4096 : 4 * 4096].tobytes() == bytes(10) + b"\x99" + bytes(4085)


@pytest.mark.parametrize("away", [Record(0, 3, fill=0), Record(0, 3, page=bytes(4096))])
def test_page_that_ceases_to_be_data_is_reported(staged: Any, away: Record) -> None:
    made = staged([70, 1])
    assert made.feed(stream_of([page(3, 0x41), page(5, 1), FAR, away], NAMES, 4096)) == 1
    made.write()
    assert made.lost == 1
    assert np.flatnonzero(to_bits(made.data[0], 70)).tolist() == [5]


def test_gap_of_a_later_round_keeps_the_pages_in_it(staged: Any) -> None:
    made = staged([70, 1], policy=AUTO)
    first = [page(k, 0x41) for k in range(10)]
    assert made.feed(stream_of([*first, FAR, page(2, 1), page(4, 1)], NAMES, 4096)) == 1
    made.write()
    assert made.content(0)[: 10 * 4096 : 4096].tolist() == [65, 65, 1, 65, 1, 65, 65, 65, 65, 65]


def test_zeros_alone_write_nothing(staged: Any) -> None:
    made = staged([70, 1])
    assert made.feed(stream_of([Record(0, k, fill=0) for k in range(70)], NAMES, 4096)) == 1
    made.write()
    assert os.fstat(made.file.fd).st_blocks == 0


def test_stage_outside_of_its_block_is_refused(staged: Any) -> None:
    made = staged([70, 1])
    too_long = (0, lib.QM_STAGING_MAX + 4096)
    for off, length in ((CHUNK, 4096), (4096, 4096), (0, 71 * 4096), too_long):
        made.stage.off, made.stage.len = off, length
        assert made.write_stage(0) == -errno.EINVAL
