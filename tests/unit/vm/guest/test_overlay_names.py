"""The names of overlays: bounded, new, and after the disk however many there are."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.vm.guest.overlay_names import overlay_name


def free(_: str) -> bool:
    return False


def test_name_is_of_the_disk_and_the_snapshot() -> None:
    assert overlay_name(["disk.raw"], "monday", free) == "disk.raw.monday.qcow2"


def test_overlay_over_overlays_is_named_after_the_bottom() -> None:
    chain = ["disk.b.qcow2", "disk.a.qcow2", "disk"]
    assert overlay_name(chain, "c", free) == "disk.c.qcow2"


def test_image_that_many_disks_are_made_over_gives_no_name() -> None:
    chain = ["vm7.monday.qcow2", "vm7", "golden.qcow2"]
    assert overlay_name(chain, "tuesday", free) == "vm7.tuesday.qcow2"


def test_taken_name_gets_a_number() -> None:
    taken = {"d.s.qcow2", "d.s.2.qcow2"}
    assert overlay_name(["d"], "s", taken.__contains__) == "d.s.3.qcow2"


@pytest.mark.parametrize("disk", ["d" * 255, "\u00e4" * 127, "d.qcow2" * 36])
def test_a_hundred_overlays_of_a_long_name_have_names(disk: str) -> None:
    chain = [disk]
    for number in range(100):
        name = overlay_name(chain, f"{'s' * 250}{number}", chain.__contains__)
        assert len(os.fsencode(name)) <= 255 and name not in chain
        chain.insert(0, name)


@given(
    st.lists(st.text("ab.\udcff\u00e4q", min_size=1), min_size=1, max_size=4), st.text("a.\u00e4")
)
def test_name_is_always_one(chain: list[str], purpose: str) -> None:
    name = overlay_name(chain, purpose, free)
    assert 0 < len(os.fsencode(name)) <= 255 and "/" not in name
