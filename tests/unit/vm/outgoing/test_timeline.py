"""The phases of a save, collected where things happen."""

from __future__ import annotations

import itertools
import time

import pytest

from pyqmigrate.io.channels import Channels, Range
from pyqmigrate.vm.outgoing.timeline import Lane, Phase, Timeline


def names(phases: tuple[Phase, ...]) -> list[tuple[str, str]]:
    return [(phase.lane, phase.name) for phase in phases]


@pytest.fixture
def timeline() -> Timeline:
    return Timeline(time.monotonic() - 10)


def pauses_at(*times: tuple[float, float | None]) -> list[tuple[float, float | None]]:
    """Pauses by seconds after the beginning, ten seconds ago, as the host's clock has them."""
    zero = time.time() - 10
    return [(zero + start, None if end is None else zero + end) for start, end in times]


def test_phases_are_in_order_of_their_start(timeline: Timeline) -> None:
    with timeline.phase(Lane.FILE, "fsync"):
        pass
    timeline.add(Lane.QEMU, "device state", time.monotonic() - 5, time.monotonic() - 4)
    phases = timeline.phases([], runs_at_first=False)
    assert names(phases) == [("guest", "stopped"), ("qemu", "device state"), ("file", "fsync")]
    assert phases[1].begins == pytest.approx(5, abs=0.5)
    assert phases[1].ends == pytest.approx(6, abs=0.5)


def test_phase_that_fails_is_noted(timeline: Timeline) -> None:
    with pytest.raises(ValueError), timeline.phase(Lane.FILE, "fsync"):
        raise ValueError
    assert ("file", "fsync") in names(timeline.phases([], runs_at_first=True))


def test_guest_runs_before_and_after_a_pause(timeline: Timeline) -> None:
    phases = timeline.phases(pauses_at((2, 3)), runs_at_first=True)
    assert [phase.name for phase in phases] == ["runs", "stopped", "runs"]
    assert [phase.begins for phase in phases] == pytest.approx([0, 2, 3], abs=0.01)
    assert [phase.ends for phase in phases] == pytest.approx([2, 3, 10], abs=0.5)


def test_guest_that_stays_paused_is_stopped_until_the_end(timeline: Timeline) -> None:
    phases = timeline.phases(pauses_at((2, None)), runs_at_first=True)
    assert [phase.name for phase in phases] == ["runs", "stopped"]
    assert phases[-1].ends == pytest.approx(10, abs=0.5)


def test_guest_that_is_resumed_afterwards_was_stopped_before(timeline: Timeline) -> None:
    phases = timeline.phases(pauses_at((0, 4)), runs_at_first=False)
    assert [phase.name for phase in phases] == ["stopped", "runs"]


@pytest.mark.parametrize("pause", [(-500.0, 3.0), (2.0, 1.0), (900.0, 950.0)])
def test_times_of_a_clock_that_was_set_stay_in_the_save(
    timeline: Timeline, pause: tuple[float, float]
) -> None:
    phases = timeline.phases(pauses_at(pause), runs_at_first=True)
    assert all(0 <= phase.begins <= phase.ends < 11 for phase in phases)
    assert all(a.ends == b.begins for a, b in itertools.pairwise(phases))


def test_each_channel_has_a_lane_with_its_pages(timeline: Timeline) -> None:
    channels = Channels(2, "test")
    timeline.watch(channels, "write")
    channels.run([Range(0, 8 * n, 8) for n in range(5)], lambda *_: 0, "file", ["ram"])
    phases = [p for p in timeline.phases([], runs_at_first=True) if p.lane != "guest"]
    assert {phase.lane for phase in phases} == {"channel 1", "channel 2"}
    assert sum(phase.pages or 0 for phase in phases) == 40


def test_channel_that_fails_has_a_phase_too(timeline: Timeline) -> None:
    channels = Channels(1, "test")
    timeline.watch(channels, "write")

    def fail(*_: object) -> int:
        raise OSError(5, "made up")

    with pytest.raises(OSError, match="made up"):
        channels.run([Range(0, 0, 8)], fail, "file", ["ram"])
    assert ("channel 1", "write") in names(timeline.phases([], runs_at_first=True))
