"""What a save is going to need, and what is changed so that it fits."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from pyqmigrate.io.memory import FileMemory
from pyqmigrate.snapshot.save.writer import Sparse
from pyqmigrate.vm.guest.inspect import GuestBlock, GuestInfo
from pyqmigrate.vm.plan.engine import choose_engine
from pyqmigrate.vm.plan.plan import Plan, make_plan

MIB = 1 << 20
PAGE = 4096
LENGTH = 64 * MIB
ROOM = 8 * MIB
"""More than what a file has besides pages."""


@contextmanager
def memory(pattern: bytes) -> Iterator[GuestBlock]:
    """A block full of ``pattern``, which is some pages long."""
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, LENGTH)
        with mmap.mmap(fd, LENGTH) as view:
            view[:] = pattern * (LENGTH // len(pattern))
        yield GuestBlock("ram", LENGTH, PAGE, 0, FileMemory(fd, 0, LENGTH), True, True)
    finally:
        os.close(fd)


DATA, ZERO = b"x" * PAGE, bytes(PAGE)
SPECKLED = DATA + ZERO
RUNS = DATA * 128 + ZERO * 128


def planned(block: GuestBlock, engine: str, free: int | None, sparse: Sparse = Sparse.AUTO) -> Plan:
    guest = GuestInfo(
        version=(10, 0, 2),
        process=None,
        binary="",
        machine="pc",
        target="x86_64",
        target_page_bits=12,
        run_state="running",
        running=True,
        uuid="",
        blocks=(block,),
        capabilities={"mapped-ram": False, "multifd": False, "x-ignore-shared": False},
        parameters={"zero-page-detection": "multifd"},
        migration_status="none",
        blocked_reasons=(),
        disks=(),
        devices=(),
        dirty_bitmaps=(),
        commands=frozenset({"xen-save-devices-state"}),
    )
    choice = choose_engine(guest, engine=engine)
    return make_plan(
        guest, choice, channels=2, direct=True, sparse=sparse, with_disks=False, free=free
    )


def detection(plan: Plan) -> object:
    return plan.changes.parameters["zero-page-detection"].after


@pytest.mark.parametrize("engine", ["qemu", "direct"])
def test_fast_settings_stay_where_there_is_room(engine: str) -> None:
    with memory(SPECKLED) as block:
        plan = planned(block, engine, LENGTH + ROOM)
    assert plan.fits and plan.sparse is Sparse.AUTO and not plan.notes


def test_zero_pages_that_qemu_would_write_count() -> None:
    with memory(SPECKLED) as block:
        assert planned(block, "qemu", None).need >= LENGTH


def test_qemu_is_told_to_leave_zero_pages_out_where_all_pages_do_not_fit() -> None:
    with memory(SPECKLED) as block:
        assert detection(planned(block, "qemu", LENGTH + ROOM)) == "none"
        plan = planned(block, "qemu", LENGTH * 3 // 4)
    assert detection(plan) == "legacy"
    assert plan.fits and "sparse exact" in plan.notes[0]


def test_gaps_that_we_would_write_along_count() -> None:
    with memory(SPECKLED) as block:
        auto = planned(block, "direct", LENGTH // 2)
        exact = planned(block, "direct", LENGTH // 2, Sparse.EXACT)
    assert auto.need >= LENGTH // 2 * 3 // 2
    assert LENGTH // 2 <= exact.need < LENGTH // 2 + ROOM


def test_we_leave_zero_pages_out_where_gaps_do_not_fit() -> None:
    with memory(SPECKLED) as block:
        plan = planned(block, "direct", LENGTH // 2 + ROOM)
    assert plan.fits and plan.sparse is Sparse.EXACT
    assert "sparse exact" in plan.notes[0]


@pytest.mark.parametrize("engine", ["qemu", "direct"])
def test_data_that_does_not_fit_is_reported_with_the_need_of_what_was_asked_for(
    engine: str,
) -> None:
    with memory(RUNS) as block:
        plan = planned(block, engine, LENGTH // 4)
    assert plan.fits is False and plan.data == LENGTH // 2
    assert plan.sparse is Sparse.AUTO and not plan.notes


@pytest.mark.parametrize("engine", ["qemu", "direct"])
def test_dense_that_does_not_fit_is_not_made_sparse(engine: str) -> None:
    with memory(RUNS) as block:
        plan = planned(block, engine, LENGTH * 3 // 4, Sparse.DENSE)
    assert plan.fits is False and plan.sparse is Sparse.DENSE


def test_memory_that_cannot_be_read_counts_in_full() -> None:
    with memory(ZERO) as block:
        unseen = replace(block, memory=None, why_not="no privilege")
        plan = planned(unseen, "qemu", LENGTH // 2)
    assert plan.fits is False and plan.need >= LENGTH


def test_nothing_is_counted_where_all_that_may_be_data_fits() -> None:
    with memory(RUNS) as block:
        assert planned(block, "direct", 2 * LENGTH).data is None


def test_file_system_without_a_limit_leaves_it_open() -> None:
    with memory(RUNS) as block:
        assert planned(block, "direct", None).fits is None
