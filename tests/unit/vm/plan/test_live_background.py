"""Whether a guest can be saved as a background snapshot, and how long it is expected to stand."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.guest.process import Mapping
from pyqmigrate.vm.plan import live_background
from pyqmigrate.vm.plan.live_background import background_option
from pyqmigrate.vm.plan.live_option import LiveRequest
from tests.harness.guest_info import file_block, guest, private_block

CAPABILITIES = {"mapped-ram": False, "background-snapshot": False}


class Self:
    """This process, in place of QEMU's."""

    pid = os.getpid()


def found(*blocks: Any, **changes: Any) -> GuestInfo:
    return guest(*blocks, **({"capabilities": CAPABILITIES} | changes))


def test_running_guest_with_the_capability_can_be_saved() -> None:
    assert background_option(found(), LiveRequest()).possible


@pytest.mark.parametrize(
    ("changes", "request_", "reason"),
    [
        ({"capabilities": {"mapped-ram": False}}, LiveRequest(), "no background-snapshot"),
        ({"running": False}, LiveRequest(), "does not run"),
        ({}, LiveRequest(base="auto"), "no base"),
        ({}, LiveRequest(keep_digests=True), "no digests"),
    ],
)
def test_reasons_against_it(changes: dict[str, Any], request_: LiveRequest, reason: str) -> None:
    assert any(reason in text for text in background_option(found(**changes), request_).reasons)


def test_huge_pages_are_protected_faster_than_private_and_those_faster_than_shared() -> None:
    shared, private = file_block(size=4096), private_block(size=4096)
    pauses = [
        background_option(found(block), LiveRequest()).expected_pause
        for block in (replace(shared, page_size=2 << 20), private, shared)
    ]
    assert pauses == sorted(pauses)  # type: ignore[type-var]
    assert pauses[1] is not None and pauses[1] <= 0.1
    assert pauses[2] is not None and pauses[2] <= 0.15


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_memory_on_a_disk_is_a_reason(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = file_block(size=1)
    place = Mapping(
        block.host_address, block.host_address + block.length, True, False, 0, 7, 1, "x"
    )
    monkeypatch.setattr(live_background, "read_mappings", lambda pid: [place])
    monkeypatch.setattr(live_background, "_file_systems", lambda pid: {7: kind})
    [reason] = background_option(found(block, process=Self()), LiveRequest()).reasons
    assert kind in reason
    monkeypatch.setattr(live_background, "_file_systems", lambda pid: {7: "tmpfs"})
    assert background_option(found(block, process=Self()), LiveRequest()).possible


def test_file_systems_of_a_process_are_read() -> None:
    with tempfile.TemporaryDirectory() as directory:
        device = Path(directory).stat().st_dev
        assert live_background._file_systems(os.getpid()).get(device, "overlay")
    assert "tmpfs" in live_background._file_systems(os.getpid()).values()
