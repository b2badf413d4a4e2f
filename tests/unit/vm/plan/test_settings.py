"""Which settings are changed for a save, and why."""

from __future__ import annotations

from typing import Any

import pytest

from pyqmigrate.errors import NotSupported
from pyqmigrate.qapi.capabilities import (
    _AGAINST_BACKGROUND_SNAPSHOT,
    CAPABILITY_NAMES,
    Capabilities,
)
from pyqmigrate.snapshot.save.writer import Sparse
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.live_converge import downtime_limit
from pyqmigrate.vm.plan.sampling import Sample
from pyqmigrate.vm.plan.settings import Changes, for_background, for_device_state, for_pages

GIB = 1 << 30
CAPABILITIES = dict.fromkeys(
    (
        "mapped-ram",
        "multifd",
        "x-ignore-shared",
        "xbzrle",
        "release-ram",
        "events",
        "return-path",
        "pause-before-switchover",
        "dirty-bitmaps",
    ),
    False,
)
PARAMETERS = {
    "multifd-channels": 2,
    "direct-io": False,
    "zero-page-detection": "multifd",
    "max-bandwidth": 134217728,
    "multifd-compression": "none",
    "tls-creds": "",
    "mode": "normal",
    "avail-switchover-bandwidth": 0,
    "downtime-limit": 300,
}


def guest(
    capabilities: dict[str, bool] | None = None,
    parameters: dict[str, Any] | None = None,
    *,
    running: bool = True,
    without: tuple[str, ...] = (),
) -> GuestInfo:
    def kept(settings: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if name not in without}

    return GuestInfo(
        version=(10, 0, 2),
        process=None,
        binary="",
        machine="pc-i440fx-10.0",
        target="x86_64",
        target_page_bits=12,
        run_state="running" if running else "paused",
        running=running,
        uuid="",
        blocks=(),
        capabilities=kept({**CAPABILITIES, **(capabilities or {})}),
        parameters=kept({**PARAMETERS, **(parameters or {})}),
        migration_status="none",
        blocked_reasons=(),
        disks=(),
        devices=(),
        dirty_bitmaps=(),
        commands=frozenset(),
    )


def pages(
    found: GuestInfo,
    *,
    direct: bool = True,
    sparse: Sparse = Sparse.AUTO,
    pause: bool = False,
    sample: Sample | None = None,
) -> Changes:
    return for_pages(found, channels=4, direct=direct, sparse=sparse, pause=pause, sample=sample)


def zero_pages(sample: Sample | None, sparse: Sparse = Sparse.AUTO) -> object:
    return pages(guest(), sample=sample, sparse=sparse).parameters["zero-page-detection"].after


def test_only_what_differs_is_changed() -> None:
    changes = pages(guest(running=False))
    assert set(changes.capabilities) == {"mapped-ram", "multifd", "events"}
    assert set(changes.parameters) == {
        "multifd-channels",
        "direct-io",
        "zero-page-detection",
        "max-bandwidth",
    }


def test_every_change_knows_what_was_before_and_why() -> None:
    changes = pages(guest())
    for name, change in {**changes.capabilities, **changes.parameters}.items():
        assert change.before == {**CAPABILITIES, **PARAMETERS}[name] != change.after
        assert change.why


def test_background_snapshot_switches_off_what_qemu_refuses_with_it() -> None:
    refused = (
        "multifd",
        "return-path",
        "xbzrle",
        "release-ram",
        "dirty-bitmaps",
        "x-ignore-shared",
    )
    found = guest(
        dict.fromkeys((*refused, "background-snapshot"), True) | {"background-snapshot": False}
    )
    changes = for_background(found, sparse=Sparse.AUTO)
    after = {name: change.after for name, change in changes.capabilities.items()}
    assert after == dict.fromkeys(refused, False) | {
        "mapped-ram": True,
        "background-snapshot": True,
        "events": True,
    }
    assert changes.parameters["max-bandwidth"].after == 0
    assert changes.parameters["zero-page-detection"].after == "legacy"
    with pytest.raises(NotSupported):
        for_background(guest(), sparse=Sparse.AUTO)


def test_all_that_background_snapshot_excludes_is_switched_off() -> None:
    """By the checks of QEMU that this package has."""
    on = {name: name in _AGAINST_BACKGROUND_SNAPSHOT for name in CAPABILITY_NAMES}
    names = {name.replace("_", "-"): state for name, state in on.items()}
    changes = for_background(guest(names), sparse=Sparse.AUTO)
    after = names | {name: change.after for name, change in changes.capabilities.items()}
    Capabilities().merge(after)  # raises if QEMU would refuse it


def test_long_zero_runs_are_left_out_in_order() -> None:
    assert zero_pages(Sample(4 * GIB, 2 * GIB, 16384)) == "legacy"


def test_single_zero_pages_are_written_along() -> None:
    assert zero_pages(Sample(4 * GIB, int(2.8 * GIB), 220_000)) == "none"


def test_memory_that_is_all_data_is_looked_through_in_order() -> None:
    assert zero_pages(Sample(4 * GIB, 4 * GIB, 0)) == "legacy"


def test_memory_that_cannot_be_looked_at_is_taken_for_runs() -> None:
    assert zero_pages(None) == "legacy"


def test_exact_allocates_no_zero_page_whatever_it_costs() -> None:
    assert zero_pages(Sample(4 * GIB, int(2.8 * GIB), 220_000), Sparse.EXACT) == "legacy"


def test_dense_writes_every_page() -> None:
    assert zero_pages(Sample(4 * GIB, 2 * GIB, 16384), Sparse.DENSE) == "none"


def test_direct_io_that_is_not_to_be_had_is_switched_off() -> None:
    changes = pages(guest(parameters={"direct-io": True}), direct=False)
    assert changes.parameters["direct-io"].after is False


def test_device_state_of_a_running_guest_comes_at_once() -> None:
    name = "avail-switchover-bandwidth"
    assert name in for_device_state(guest(), pause=False).parameters
    assert name not in for_device_state(guest(running=False), pause=False).parameters
    assert name not in pages(guest()).parameters


def test_what_may_change_later_is_put_back_too() -> None:
    unlimited = guest(parameters={"max-bandwidth": 0})
    assert pages(unlimited).touched == {"downtime-limit": 300, "max-bandwidth": 0}


@pytest.mark.parametrize("name", ["release-ram", "xbzrle", "return-path", "x-ignore-shared"])
def test_capability_in_the_way_is_switched_off(name: str) -> None:
    assert pages(guest({name: True})).capabilities[name].after is False


@pytest.mark.parametrize("name", ["events", "dirty-bitmaps"])
def test_capability_that_does_no_harm_stays(name: str) -> None:
    assert name not in pages(guest({name: True})).capabilities


def test_pause_is_switched_on_only_where_something_is_done_meanwhile() -> None:
    name = "pause-before-switchover"
    assert pages(guest(), pause=True).capabilities[name].after is True
    assert pages(guest({name: True})).capabilities[name].after is False


def test_device_state_comes_as_a_sequential_stream_without_shared_memory() -> None:
    changes = for_device_state(guest({"mapped-ram": True, "multifd": True}), pause=False)
    states = {name: change.after for name, change in changes.capabilities.items()}
    assert states == {
        "mapped-ram": False,
        "multifd": False,
        "x-ignore-shared": True,
        "events": True,
    }


def test_setting_that_this_qemu_does_not_have_is_left_alone() -> None:
    changes = pages(guest(without=("direct-io", "zero-page-detection", "mode")))
    assert not {"direct-io", "zero-page-detection", "mode"} & changes.parameters.keys()


def test_qemu_without_mapped_ram_is_not_supported() -> None:
    with pytest.raises(NotSupported, match=r"10\.0\.2"):
        pages(guest(without=("mapped-ram",)))


def test_guest_of_a_live_save_is_stopped_by_the_limit_and_not_slowed_down() -> None:
    found = guest(
        {"auto-converge": True}, {"downtime-limit": 300, "avail-switchover-bandwidth": GIB}
    )
    changes = for_pages(
        found,
        channels=2,
        direct=True,
        sparse=Sparse.AUTO,
        pause=False,
        sample=None,
        downtime_limit=14,
    )
    assert changes.parameters["downtime-limit"].after == 14
    assert changes.parameters["avail-switchover-bandwidth"].after == 0
    assert changes.capabilities["auto-converge"].after is False


@pytest.mark.parametrize(("pause", "limit"), [(0.02, 14), (0.01, 7), (0.004, 2), (0.001, 1)])
def test_limit_leaves_time_to_stop_and_resume_the_guest(pause: float, limit: int) -> None:
    assert downtime_limit(pause) == limit
