"""The binding to the compiled core."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

import pyqmigrate._core as _core
from pyqmigrate.core import Channel, Fault, JobState, error_from_fault
from pyqmigrate.errors import Cancelled, GuestMemoryError, NoSpace, TargetError
from pyqmigrate.io.block_index import BlockIndex
from pyqmigrate.io.records import Decoder, Encoder


class LibraryWithout:
    """The core, with one function that fails to allocate."""

    def __init__(self, name: str) -> None:
        self._lib = _core.lib
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            return lambda *_: _core.ffi.NULL
        return getattr(self._lib, name)


@pytest.mark.parametrize(
    ("function", "make"),
    [
        ("qm_channel_create", Channel),
        ("qm_job_create", JobState),
        ("qm_index_create", lambda: BlockIndex(10, 4096)),
        ("qm_encoder_create", lambda: Encoder(-1, 0)),
        ("qm_decoder_create", lambda: Decoder([("ram", 4096)], 4096).start()),
    ],
)
def test_null_pointer_is_a_memory_error(
    monkeypatch: pytest.MonkeyPatch, function: str, make: Callable[[], object]
) -> None:
    make()
    monkeypatch.setattr(_core, "lib", LibraryWithout(function))
    with pytest.raises(MemoryError):
        make()


def test_closed_channel_can_be_closed_again() -> None:
    with Channel() as channel:
        assert not channel.fault.in_memory
    channel.close()


def test_job_counts_what_python_did() -> None:
    job = JobState()
    job.count_io(100)
    job.count_pages(8192, data_pages=1, zero_pages=1)
    totals = job.totals()
    assert (totals.bytes_moved, totals.bytes_done) == (100, 8192)
    assert (totals.data_pages, totals.zero_pages, totals.calls) == (1, 1, 0)
    assert not job.cancelled
    job.cancel()
    assert job.cancelled


@pytest.mark.parametrize(
    ("number", "in_memory", "kind"),
    [
        (errno.ECANCELED, 0, Cancelled),
        (errno.EFAULT, 1, GuestMemoryError),
        (errno.EIO, 1, GuestMemoryError),
        (errno.EIO, 0, TargetError),
        (errno.ENOSPC, 0, NoSpace),
        (errno.EDQUOT, 0, NoSpace),
    ],
)
def test_error_numbers_become_exceptions(
    number: int, in_memory: int, kind: type[Exception]
) -> None:
    fault = Fault()
    fault.core.in_memory, fault.core.at = in_memory, 0x1000
    error = error_from_fault(-number, fault, "target", "pc.ram")
    assert type(error) is kind
    if isinstance(error, OSError):
        assert error.errno == number


def test_fault_without_a_place_is_of_the_target() -> None:
    error = error_from_fault(-errno.ENOMEM, Fault(), "target", "pc.ram")
    assert isinstance(error, TargetError)
    assert error.errno == errno.ENOMEM
    assert "pc.ram" in str(error)
