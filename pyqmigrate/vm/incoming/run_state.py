"""What the run state of a guest that does not run means, and what lets it go on."""

from __future__ import annotations

__all__ = ["RUNS", "describe_state"]

RUNS = ("running", "suspended")  # a guest in suspended sleeps, and its devices go on

_MEANING = {
    "paused": "cont lets it run",
    "prelaunch": "it has not run yet; cont starts it",
    "io-error": "a disk request failed; cont tries it again, once the cause is gone",
    "internal-error": "its processors could not go on (KVM internal error); only system_reset "
    "followed by cont lets it run, from its firmware on",
    "guest-panicked": "its kernel had crashed; look at its memory (pyqmigrate convert --to elf), "
    "or use system_reset followed by cont",
    "shutdown": "it had shut down; system_reset followed by cont starts it anew",
    "watchdog": "its watchdog had fired; cont lets it run",
    "postmigrate": "cont lets it run",
}


def describe_state(state: str, saved: str | None, *, asked_to_run: bool) -> str | None:
    """A sentence on a guest that is in ``state`` after a restore; None for one that runs.

    ``saved`` is the run state in the snapshot, None where that does not show it.
    """
    if state in RUNS:
        return None
    when = ", as it was when it was saved" if state == saved else ""
    if saved not in (None, state, *RUNS):
        when = f" and was {saved} when it was saved"
    meaning = _MEANING.get(state, "")
    trouble = " and cannot simply go on" if asked_to_run else ""
    return f"the guest is {state}{when}{trouble}" + f": {meaning}" * bool(meaning)
