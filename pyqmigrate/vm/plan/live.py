"""Choose how a guest is saved while it runs.

Each method has a module that knows the reasons against it and how long it pauses the guest
(:mod:`~pyqmigrate.vm.plan.live_converge` and so on). The method with the shortest expected pause is
tried first; with a promised pause (``max_pause``) only the methods that are expected to keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pyqmigrate.errors import NotSupported, QemuError
from pyqmigrate.vm.guest.inspect import GuestInfo
from pyqmigrate.vm.plan.blockers import why_no_migration
from pyqmigrate.vm.plan.engine import Engine, EngineChoice
from pyqmigrate.vm.plan.live_option import Instant, LiveMethod, LiveOption, LiveRequest, disks_pause

__all__ = ["ENGINES", "LiveChoice", "automatic_precopy", "choose_live", "live_options"]

ENGINES: Mapping[LiveMethod, Engine] = {
    LiveMethod.CONVERGE: Engine.QEMU,
    LiveMethod.BACKGROUND: Engine.QEMU,
    LiveMethod.PRECOPY: Engine.DIRECT,
    LiveMethod.CHANGED: Engine.DIRECT,
}
_ROUNDING = 1e-6  # seconds


@dataclass(frozen=True)
class LiveChoice:
    """A live method to try, and a sentence ``why``.

    ``expected_pause`` is in seconds, None if unknown. ``refused`` has the reasons against each
    method that was considered and is not possible.
    """

    method: LiveMethod
    why: str
    expected_pause: float | None
    refused: Mapping[LiveMethod, tuple[str, ...]]

    @property
    def instant(self) -> Instant:
        """The instant of the save whose state the file holds."""
        return self.method.instant

    @property
    def engine(self) -> Engine:
        return ENGINES[self.method]


def live_options(guest: GuestInfo, request: LiveRequest) -> tuple[LiveOption, ...]:
    """Return what is known of each method that ``request`` allows. Blocks."""
    options = (_option(method)(guest, request) for method in request.methods)
    return tuple(_with_disks(option, guest, request) for option in options)


def choose_live(guest: GuestInfo, request: LiveRequest) -> list[LiveChoice]:
    """Return the methods to try, the shortest expected pause first. Blocks.

    Raises NotSupported, with all reasons, if no method is possible or none is expected to keep
    ``request.max_pause``; QemuError if the guest cannot be saved now.
    """
    if (why_not := why_no_migration(guest)) is not None:
        raise QemuError(why_not)
    options = []
    refused: dict[LiveMethod, tuple[str, ...]] = {}
    for option in live_options(guest, request):
        reasons = [*option.reasons, *_against(option, request)]
        if reasons:
            refused[option.method] = tuple(reasons)
        else:
            options.append(option)
    if not options:
        raise NotSupported(
            "this guest cannot be saved live as requested: "
            + "; ".join(f"{method}: {', '.join(refused[method])}" for method in refused)
        )
    options.sort(key=_pause_of)  # stable: otherwise in the order requested
    alone = len(request.methods) == 1
    return [
        LiveChoice(option.method, _why(option, alone, rank), option.expected_pause, refused)
        for rank, option in enumerate(options)
    ]


def _option(method: LiveMethod) -> Callable[[GuestInfo, LiveRequest], LiveOption]:
    """Return what finds out about a method; imported only for a live save, or the check of one."""
    match method:
        case LiveMethod.CONVERGE:
            from pyqmigrate.vm.plan.live_converge import converge_option

            return converge_option
        case LiveMethod.BACKGROUND:
            from pyqmigrate.vm.plan.live_background import background_option

            return background_option
        case LiveMethod.PRECOPY:
            from pyqmigrate.vm.plan.live_precopy import precopy_option

            return precopy_option
        case LiveMethod.CHANGED:
            from pyqmigrate.vm.plan.live_changed import changed_option

            return changed_option


def _with_disks(option: LiveOption, guest: GuestInfo, request: LiveRequest) -> LiveOption:
    """Add the time that snapshots of the disks take."""
    seconds = disks_pause(guest, request.with_disks)
    if not seconds or option.expected_pause is None:
        return option
    return replace(
        option,
        expected_pause=option.expected_pause + seconds,
        basis=f"{option.basis}, and snapshots of the disks take {seconds * 1e3:.0f} ms",
    )


def automatic_precopy(guest: GuestInfo, choice: EngineChoice) -> LiveChoice | None:
    """Return the method ``precopy`` for a save that was not requested to be live, if the guest is
    better saved so by the engine of ``choice``. The guest goes on after the save. Blocks."""
    if choice.way is None or not guest.running:
        return None
    from pyqmigrate.vm.plan.live_precopy import why_precopy

    why = why_precopy(guest)
    return None if why is None else LiveChoice(LiveMethod.PRECOPY, why, None, {})


def _against(option: LiveOption, request: LiveRequest) -> list[str]:
    """Return the reasons of the request against a method."""
    engine = ENGINES[option.method]
    if request.engine not in ("auto", engine):
        return [f"engine {request.engine} was requested, and this is engine {engine}'s"]
    if request.max_pause is None:
        return []
    if option.expected_pause is None:
        return ["how long it pauses the guest is not known"]
    if option.expected_pause > request.max_pause + _ROUNDING:
        return [
            f"it pauses the guest for about {option.expected_pause * 1e3:.0f} ms "
            f"({option.basis}), and {request.max_pause * 1e3:.0f} ms are allowed"
        ]
    return []


def _pause_of(option: LiveOption) -> float:
    return float("inf") if option.expected_pause is None else option.expected_pause


def _why(option: LiveOption, alone: bool, rank: int) -> str:
    if alone:
        return "it was requested"
    if option.expected_pause is None:
        return "no other method is left"
    return (
        f"its expected pause is the shortest{' of the methods left' if rank else ''}: "
        f"{option.expected_pause * 1e3:.0f} ms ({option.basis})"
    )
