"""The note on a guest that does not run after a restore."""

from __future__ import annotations

import pytest

from pyqmigrate.vm.incoming.run_state import describe_state


@pytest.mark.parametrize("state", ["running", "suspended"])
def test_guest_that_runs_needs_no_word(state: str) -> None:
    assert describe_state(state, "running", asked_to_run=False) is None


def test_what_was_saved_is_said_only_where_it_was_so() -> None:
    same = describe_state("paused", "paused", asked_to_run=False)
    assert same == "the guest is paused, as it was when it was saved: cont resumes it"
    other = describe_state("paused", "internal-error", asked_to_run=False)
    assert other == "the guest is paused and was internal-error when it was saved: cont resumes it"
    unknown = describe_state("paused", None, asked_to_run=False)
    assert unknown == "the guest is paused: cont resumes it"
    assert "saved" not in str(describe_state("paused", "running", asked_to_run=False))


@pytest.mark.parametrize(
    ("state", "way"),
    [
        ("internal-error", "only system_reset"),
        ("guest-panicked", "convert --to elf"),
        ("io-error", "once the cause is removed"),
        ("shutdown", "restarts it"),
    ],
)
def test_guest_that_cannot_simply_go_on_has_its_way_out(state: str, way: str) -> None:
    said = describe_state(state, state, asked_to_run=True)
    assert said is not None
    assert said.startswith(f"the guest is {state}, as it was when it was saved and cannot simply")
    assert way in said
