"""Ranges, and channels that work through them."""

from __future__ import annotations

import errno
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyqmigrate
from pyqmigrate._core import ffi, lib
from pyqmigrate.core import CHUNK, Channel
from pyqmigrate.io.bitmap import Bitmap
from pyqmigrate.io.channels import Channels, Range, selected_ranges, split_ranges
from tests.harness.examples import some
from tests.harness.kernel import PAGE_SIZES


@some
@given(st.one_of(st.integers(1, 10000), st.integers(1, 1 << 30)), st.sampled_from(PAGE_SIZES))
def test_ranges_cover_a_block_once_and_start_on_chunks(npages: int, page_size: int) -> None:
    ranges = list(split_ranges(3, npages, page_size))
    assert len(ranges) <= 8193
    at = 0
    for item in ranges:
        assert (item.block, item.first) == (3, at)
        assert item.first * page_size % lib.QM_CHUNK == 0
        assert item.npages > 0
        at += item.npages
    assert at == npages


def run(channels: Channels, count: int, move: Any) -> None:
    channels.run(iter([Range(0, n, 1) for n in range(count)]), move, "target", ["ram"])


def test_every_range_is_moved_once() -> None:
    seen: list[int] = []
    run(Channels(4, "test"), 1000, lambda channel, item: seen.append(item.first) or 0)
    assert sorted(seen) == list(range(1000))


def test_channels_have_threads_and_buffers_of_their_own() -> None:
    barrier = threading.Barrier(3, timeout=10)
    seen: set[tuple[int, int]] = set()

    def move(channel: Channel, item: Range) -> int:
        seen.add((threading.get_ident(), int(ffi.cast("uintptr_t", channel.core))))
        barrier.wait()
        return 0

    run(Channels(3, "test"), 3, move)
    assert len({thread for thread, _ in seen}) == len({c for _, c in seen}) == 3
    assert threading.get_ident() not in {thread for thread, _ in seen}


def test_the_first_failure_stops_all_and_is_raised() -> None:
    threads = threading.active_count()
    calls: list[int] = []

    def move(channel: Channel, item: Range) -> int:
        calls.append(item.first)
        if item.first == 2:
            channel.fault.core.in_memory, channel.fault.core.at = 0, 0x5000
            return -errno.EIO
        time.sleep(0.005)
        return -errno.ECANCELED if channels.cancelled else 0

    channels = Channels(2, "test")
    with pytest.raises(pyqmigrate.TargetError) as caught:
        run(channels, 1000, move)
    assert (caught.value.errno, caught.value.position) == (errno.EIO, 0x5000)
    assert len(calls) < 20
    assert threading.active_count() == threads


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_an_exception_in_a_channel_is_raised(kind: type[BaseException]) -> None:
    def move(channel: Channel, item: Range) -> int:
        raise kind("inside")

    with pytest.raises(kind, match="inside"):
        run(Channels(2, "test"), 10, move)


def test_an_exception_from_the_ranges_is_raised() -> None:
    def ranges() -> Any:
        yield Range(0, 0, 1)
        raise LookupError("no more")

    with pytest.raises(LookupError):
        Channels(2, "test").run(ranges(), lambda c, i: 0, "target", ["ram"])


def test_cancelled_channels_raise_cancelled() -> None:
    channels = Channels(1, "test")
    channels.cancel()
    with pytest.raises(pyqmigrate.Cancelled):
        run(channels, 1, lambda c, i: -errno.ECANCELED)


def test_a_thread_that_cannot_be_started_is_an_error_and_no_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    with (
        monkeypatch.context() as patched,
        pytest.raises(pyqmigrate.TargetError, match="cannot start a thread"),
    ):
        patched.setattr(threading.Thread, "start", start)
        run(Channels(4, "test"), 10, lambda c, i: time.sleep(0.01) or 0)
    assert not any(thread.is_alive() for thread in started)


@some
@given(st.sets(st.integers(0, 9999), max_size=40), st.sampled_from(PAGE_SIZES))
def test_selected_ranges_are_whole_chunks_around_every_bit(pages: set[int], page_size: int) -> None:
    selection = Bitmap(10000)
    for page in pages:
        selection.core[page // 64] |= 1 << page % 64
    chunk = CHUNK // page_size
    covered: set[int] = set()
    for item in selected_ranges(2, selection, page_size):
        assert item.block == 2 and item.first % chunk == 0
        here = set(range(item.first, item.first + item.npages))
        assert not here & covered and max(here) < 10000
        covered |= here
    assert pages <= covered
    assert len(covered) <= len({page // chunk for page in pages}) * chunk
