"""Which live methods are tried, in which order, and what a promised pause excludes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyqmigrate.errors import NotSupported, QemuError, UsageError
from pyqmigrate.vm.guest.disks import Disk
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan import live
from pyqmigrate.vm.plan.live import LiveChoice, choose_live, live_options
from pyqmigrate.vm.plan.live_converge import converge_option
from pyqmigrate.vm.plan.live_option import Instant, LiveMethod, LiveOption, LiveRequest, check_live
from tests.harness.guest_info import guest

CONVERGE, BACKGROUND = LiveMethod.CONVERGE, LiveMethod.BACKGROUND
PRECOPY, CHANGED = LiveMethod.PRECOPY, LiveMethod.CHANGED


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> dict[LiveMethod, float | str | None]:
    """The expected pause of each method, or a reason against it; tests may change them."""
    known: dict[LiveMethod, float | str | None] = {
        CONVERGE: 0.02,
        BACKGROUND: 0.09,
        PRECOPY: 0.34,
        CHANGED: "the guest was not restored",
    }

    def option_of(method: LiveMethod) -> Callable[[GuestInfo, LiveRequest], LiveOption]:
        def option(_: GuestInfo, __: LiveRequest) -> LiveOption:
            pause = known[method]
            if isinstance(pause, str):
                return LiveOption(method, (pause,))
            return LiveOption(method, (), pause, "it is so")

        return option

    monkeypatch.setattr(live, "_option", option_of)
    return known


def chosen(one: GuestInfo | None = None, **options: Any) -> list[LiveChoice]:
    request = check_live(**({"live": True} | options))
    assert request is not None
    return choose_live(guest() if one is None else one, request)


def methods(**options: Any) -> list[LiveMethod]:
    return [choice.method for choice in chosen(**options)]


Pauses = dict[LiveMethod, float | str | None]


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, {}, [CONVERGE, BACKGROUND, PRECOPY]),
        ({BACKGROUND: 0.005}, {}, [BACKGROUND, CONVERGE, PRECOPY]),
        ({CHANGED: 0.013}, {}, [CHANGED, CONVERGE, BACKGROUND, PRECOPY]),
        ({CHANGED: None}, {}, [CONVERGE, BACKGROUND, PRECOPY, CHANGED]),
        ({BACKGROUND: "no privilege"}, {}, [CONVERGE, PRECOPY]),
        ({}, {"engine": "direct"}, [PRECOPY]),
        ({}, {"engine": "qemu"}, [CONVERGE, BACKGROUND]),
        ({}, {"max_pause": 0.1}, [CONVERGE, BACKGROUND]),
        ({}, {"max_pause": 0.03}, [CONVERGE]),
        ({CHANGED: None}, {"max_pause": 1}, [CONVERGE, BACKGROUND, PRECOPY]),
        ({}, {"live": "precopy"}, [PRECOPY]),
        ({}, {"live": PRECOPY, "max_pause": 0.5}, [PRECOPY]),
    ],
)
def test_shortest_expected_pause_comes_first(
    pauses: Pauses, changes: Pauses, options: dict[str, Any], expected: list[LiveMethod]
) -> None:
    pauses |= changes
    assert methods(**options) == expected


def test_pause_that_no_method_keeps_is_refused_with_all_that_is_possible(pauses: Pauses) -> None:
    with pytest.raises(NotSupported) as raised:
        chosen(max_pause=0.01)
    message = str(raised.value)
    for words in ("converge: it pauses", "about 20 ms", "about 90 ms", "about 340 ms", "10 ms are"):
        assert words in message
    assert "changed: the guest was not restored" in message


def test_method_that_was_requested_and_is_not_possible_is_refused(pauses: Pauses) -> None:
    pauses[BACKGROUND] = "no privilege"
    with pytest.raises(NotSupported, match="background: no privilege") as raised:
        chosen(live="background")
    assert "converge" not in str(raised.value)


def test_method_of_the_other_engine_is_refused(pauses: Pauses) -> None:
    with pytest.raises(NotSupported, match="engine qemu was requested"):
        chosen(live="precopy", engine="qemu")


def test_choice_says_why_and_what_was_refused(pauses: Pauses) -> None:
    first, second, *_ = chosen(max_pause=0.2)
    assert "shortest: 20 ms (it is so)" in first.why
    assert "of the methods left" in second.why
    assert set(first.refused) == {PRECOPY, CHANGED}
    (alone,) = chosen(live="converge")
    assert alone.why == "it was requested"


def test_file_holds_the_start_only_for_background(pauses: Pauses) -> None:
    assert {choice.method: choice.instant for choice in chosen()} == {
        CONVERGE: Instant.END,
        BACKGROUND: Instant.START,
        PRECOPY: Instant.END,
    }


def test_engine_is_that_of_the_method(pauses: Pauses) -> None:
    assert [choice.engine for choice in chosen()] == ["qemu", "qemu", "direct"]


def test_snapshots_of_disks_make_the_pause_longer(pauses: Pauses) -> None:
    disk = Disk("drive0", "", "node0", "/d.raw", "raw", True, 1 << 20, ())
    with_disks = guest(disks=(disk, disk))
    assert [c.method for c in chosen(with_disks, max_pause=0.04)] == [CONVERGE]
    with pytest.raises(NotSupported, match=r"about 50 ms .*snapshots of the disks take 30 ms"):
        chosen(with_disks, max_pause=0.04, with_disks=True)
    assert chosen(with_disks, with_disks=True)[0].expected_pause == pytest.approx(0.05)


@pytest.mark.parametrize(("promised", "possible"), [(0.1, True), (0.034, True), (0.033, False)])
def test_converge_leaves_time_for_snapshots_of_disks(promised: float, possible: bool) -> None:
    disk = Disk("drive0", "", "node0", "/d.raw", "raw", True, 1 << 20, ())
    options: dict[str, Any] = {"max_pause": promised, "with_disks": True, "live": "converge"}
    if possible:
        (choice,) = chosen(guest(disks=(disk, disk)), **options)
        assert choice.expected_pause == pytest.approx(promised)
    else:
        with pytest.raises(NotSupported, match="besides snapshots of the disks"):
            chosen(guest(disks=(disk, disk)), **options)


def test_guest_that_cannot_be_migrated_now_is_an_error_of_qemus(pauses: Pauses) -> None:
    with pytest.raises(QemuError, match="under way"):
        chosen(guest(migration_status="active"))


def test_options_are_those_of_the_requested_methods(pauses: Pauses) -> None:
    options = live_options(guest(), LiveRequest(methods=(PRECOPY, CONVERGE)))
    assert [option.method for option in options] == [PRECOPY, CONVERGE]


@pytest.mark.parametrize(
    ("one", "options", "reason"),
    [
        (guest(), {}, None),
        (guest(), {"max_pause": 0.004}, None),
        (guest(), {"max_pause": 0.003}, "takes about 4 ms"),
        (guest(capabilities={}), {}, "no mapped-ram"),
        (guest(run_state="suspended"), {}, "wake it"),
        (guest(), {"base": "auto"}, "knows no base"),
        (guest(), {"keep_digests": True}, "keeps no digests"),
    ],
)
def test_converge_is_possible_wherever_qemu_writes_the_file(
    one: GuestInfo, options: dict[str, Any], reason: str | None
) -> None:
    request = check_live(**({"live": True} | options))
    assert request is not None
    option = converge_option(one, request)
    assert option.possible == (reason is None)
    assert reason is None or any(reason in against for against in option.reasons)
    assert option.expected_pause == (request.max_pause or 0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"live": "slow"}, "live must be one of 'converge'"),
        ({"max_pause": 0.02}, "for live saves"),
        ({"live": True, "max_pause": 0}, "more than 0"),
        ({"live": True, "max_pause": -1}, "more than 0"),
        ({"live": True, "max_pause": float("nan")}, "more than 0"),
        ({"live": True, "max_pause": 2001}, "at most 2000 s"),
        ({"full": True}, "needs a base"),
        ({"live": True, "full": True}, "needs a base"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_live(**options)


def test_save_is_live_if_anything_needs_that(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_live() is None
    assert check_live(live=False, engine="direct") is None
    live = check_live(live=True, max_pause=0.02)
    assert live is not None and live.methods == tuple(LiveMethod) and live.max_pause == 0.02
    based = check_live(base="base.mapped", full=True)
    assert based is not None and based.base == os.fspath(tmp_path / "base.mapped")
    found = check_live(base="auto")
    assert found is not None and found.base == "auto"
    assert check_live(keep_digests=True) is not None
