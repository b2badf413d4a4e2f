"""The atomics of a job: cancel, rate, totals; several threads on one job."""

from __future__ import annotations

import errno
import threading
import time
from typing import Any

import numpy as np
import pytest

from pyqmigrate._core import ffi, lib
from tests.harness.kernel import (
    AUTO,
    CHUNK,
    DENSE,
    File,
    Memory,
    Transfer,
    guest,
    new_block,
    new_channel,
    new_job,
    new_policy,
    read,
    to_bits,
    to_words,
    totals,
    write,
)

MIB = 1 << 20


def job_data(mib: int) -> tuple[Any, Any, Any]:
    memory = guest(np.ones(mib * 256, dtype=bool), 4096)
    return Memory(base=memory), new_block(mib * MIB, 4096, MIB), ffi.new("uint64_t[]", mib * 4)


def test_a_cancelled_job_moves_nothing(file: File) -> None:
    memory, block, words = job_data(8)
    file.holes(16 * MIB)
    job = new_job()
    assert lib.qm_job_cancelled(job) == 0
    lib.qm_job_cancel(job)
    lib.qm_job_cancel(job)
    assert lib.qm_job_cancelled(job) != 0
    assert write(memory, block, file.core(direct=True), DENSE, words, job=job) == -errno.ECANCELED
    assert totals(job).bytes_moved == 0
    words = to_words(np.ones(8 * 256, dtype=bool))
    assert read(memory, block, file.core(direct=True), words, job=job) == -errno.ECANCELED
    assert totals(job).calls == 0


@pytest.mark.parametrize("work", [write, read])
def test_a_slow_job_stops_soon_after_it_is_cancelled(file: File, work: Any) -> None:
    memory, block, words = job_data(8)
    file.poison(16 * MIB)
    job = new_job()
    lib.qm_job_set_rate(job, MIB)
    results: list[tuple[int, float]] = []
    core = file.core(direct=True)

    def run() -> None:
        if work is write:
            rc = write(memory, block, core, AUTO, words, job=job)
        else:
            rc = read(memory, block, core, to_words(np.ones(8 * 256, dtype=bool)), job=job)
        results.append((rc, time.monotonic()))

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.25)
    lib.qm_job_cancel(job)
    cancelled = time.monotonic()
    thread.join()
    rc, ended = results[0]
    assert rc == -errno.ECANCELED
    assert ended - cancelled < 0.1
    assert 0 < totals(job).bytes_moved < 2 * MIB


@pytest.mark.parametrize("work", [write, read])
@pytest.mark.parametrize("rate", [8 * MIB, 40 * MIB])
def test_the_rate_is_held(file: File, rate: int, work: Any) -> None:
    mib = rate // MIB // 2
    memory, block, words = job_data(mib)
    file.poison((mib + 1) * MIB)
    job = new_job()
    lib.qm_job_set_rate(job, rate)
    started = time.monotonic()
    if work is write:
        assert write(memory, block, file.core(direct=True), DENSE, words, job=job) == 0
    else:
        words = to_words(np.ones(mib * 256, dtype=bool))
        assert read(memory, block, file.core(direct=True), words, job=job) == 0
    took = time.monotonic() - started
    # The first piece, a twentieth of a second's worth, goes at once.
    assert 0.4 <= took <= 1.0, f"{took:.2f} s for half a second's worth"


def test_the_rate_holds_for_all_channels_together(file: File) -> None:
    mib = 16
    memory, block, words = job_data(mib)
    file.holes((mib + 1) * MIB)
    job = new_job()
    lib.qm_job_set_rate(job, 32 * MIB)
    started = time.monotonic()
    run_threads(job, file, memory, block, words, 4)
    assert 0.35 <= time.monotonic() - started <= 1.0


def test_a_rate_that_is_lifted_lets_waiting_channels_go(file: File) -> None:
    memory, block, words = job_data(8)
    file.holes(9 * MIB)
    job = new_job()
    lib.qm_job_set_rate(job, 4096)  # more than half an hour
    lifted = threading.Timer(0.2, lib.qm_job_set_rate, (job, 0))
    started = time.monotonic()
    lifted.start()
    assert write(memory, block, file.core(direct=True), DENSE, words, job=job) == 0
    assert 0.19 <= time.monotonic() - started < 1.5
    lifted.join()


def test_a_rate_that_is_lowered_holds_from_then_on(file: File) -> None:
    memory, block, words = job_data(8)
    file.holes(9 * MIB)
    job = new_job()
    lib.qm_job_set_rate(job, 64 * MIB)
    lowered = threading.Timer(0.03, lib.qm_job_set_rate, (job, 8 * MIB))
    started = time.monotonic()
    lowered.start()
    assert write(memory, block, file.core(direct=True), DENSE, words, job=job) == 0
    lowered.join()
    assert 0.3 <= time.monotonic() - started <= 1.5


def test_bytes_written_elsewhere_are_counted() -> None:
    job = new_job()
    lib.qm_job_count_io(job, 12345, 0)
    done = totals(job)
    assert (done.bytes_moved, done.calls, done.bytes_done) == (12345, 0, 0)


def run_threads(job: Any, file: File, memory: Any, block: Any, words: Any, count: int) -> None:
    pages = CHUNK // 4096
    ranges = list(range(0, block.len // 4096, pages))
    lock = threading.Lock()
    failures: list[int] = []
    transfer = Transfer(
        job,
        block,
        file=file.core(direct=True),
        memory=memory.core,
        policy=new_policy(AUTO),
        data=words,
    )

    def run() -> None:
        channel = new_channel()
        fault = ffi.new("struct qm_fault *")
        while True:
            with lock:
                if not ranges:
                    return
                first = ranges.pop()
            rc = lib.qm_write(transfer.core, channel, first, pages, fault)
            if rc:
                failures.append(rc)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert totals(job).bytes_done <= block.len
        threads[0].join(0.005)
    for thread in threads:
        thread.join()
    assert failures == []


def test_channels_on_ranges_of_one_block_do_not_disturb_one_another(file: File) -> None:
    mib = 32
    bits = np.random.default_rng(3).random(mib * 256) < 0.6
    raw = guest(bits, 4096)
    block = new_block(len(raw), 4096, MIB)
    words = ffi.new("uint64_t[]", mib * 4)
    file.holes((mib + 1) * MIB)
    job = new_job()
    run_threads(job, file, Memory(base=raw), block, words, 4)
    assert (to_bits(words, len(bits)) == bits).all()
    assert (file.read(MIB, len(raw)) == raw).all()
    assert totals(job).data_pages == bits.sum()


def test_structures_come_and_go() -> None:
    for _ in range(100):
        lib.qm_channel_destroy(lib.qm_channel_create())
        lib.qm_job_destroy(lib.qm_job_create())
    lib.qm_channel_destroy(ffi.NULL)
    lib.qm_job_destroy(ffi.NULL)
