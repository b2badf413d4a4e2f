"""The run state of a restored guest: whether it is resumed, and why it does not run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.options import RestoreOptions
    from pyqmigrate.vm.incoming.saved_machine import SavedMachine

__all__ = ["CONTINUABLE", "RUNS", "describe_state", "resumes_here", "shall_resume"]

RUNS = ("running", "suspended")  # a suspended guest sleeps while its devices run
CONTINUABLE = ("paused", "prelaunch", "io-error", "watchdog")

_MEANING = {
    "paused": "cont resumes it",
    "prelaunch": "it has not run yet; cont starts it",
    "io-error": "a disk request failed; cont retries it once the cause is removed",
    "internal-error": "its processors could not continue (KVM internal error); only system_reset "
    "followed by cont restarts it, from its firmware",
    "guest-panicked": "its kernel had crashed; analyze its memory (pyqmigrate convert --to elf), "
    "or use system_reset followed by cont",
    "shutdown": "it had shut down; system_reset followed by cont restarts it",
    "watchdog": "its watchdog had fired; cont resumes it",
    "postmigrate": "cont resumes it",
}


def resumes_here(saved: SavedMachine, options: RestoreOptions) -> bool:
    """Return whether an instant restore or a load resumes the guest itself: otherwise QEMU does as soon as
    it has loaded."""
    return options.paused is not None or saved.run_state is not None


def shall_resume(
    state: str, saved: SavedMachine, options: RestoreOptions, was_running: bool
) -> bool:
    """Return whether a loaded guest in ``state`` has to be resumed; ``was_running`` is libvirt's record
    of it."""
    if options.paused is not None:
        return not options.paused and state in CONTINUABLE
    return (was_running or saved.run_state in RUNS) and state in ("paused", "prelaunch")


def describe_state(state: str, saved: str | None, *, asked_to_run: bool) -> str | None:
    """Return a sentence on a guest that is in ``state`` after a restore; None if it runs.

    ``saved`` is the run state in the snapshot, None if it is not known.
    """
    if state in RUNS:
        return None
    when = ", as it was when it was saved" if state == saved else ""
    if saved not in (None, state, *RUNS):
        when = f" and was {saved} when it was saved"
    meaning = _MEANING.get(state, "")
    problem = " and cannot simply be resumed" if asked_to_run else ""
    return f"the guest is {state}{when}{problem}" + f": {meaning}" * bool(meaning)
