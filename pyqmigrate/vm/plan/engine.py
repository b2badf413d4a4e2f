"""Choose who writes the pages of a save: QEMU, or this package."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pyqmigrate.errors import NotSupported, QemuError, UsageError
from pyqmigrate.vm.guest.inspect import GuestBlock, GuestInfo
from pyqmigrate.vm.plan.blockers import DeviceStateMethod, missed_devices, why_no_migration

__all__ = ["EngineChoice", "Engine", "choose_engine", "fall_back"]

# Bytes of other blocks that may go through QEMU's stream: ROMs, video memory.
_LARGEST_REST = 256 << 20


class Engine(StrEnum):
    """Who writes the pages."""

    QEMU = "qemu"
    DIRECT = "direct"


@dataclass(frozen=True)
class EngineChoice:
    """The engine, and a sentence ``why``; ``way`` is None for engine ``qemu``.

    ``refused`` are the reasons why engine ``direct`` is not possible, if it was considered.
    ``stays`` is false if a guest that does not run will not keep its state (it ends in
    ``postmigrate``).
    """

    engine: Engine
    way: DeviceStateMethod | None
    why: str
    refused: tuple[str, ...] = ()
    stays: bool = True


def choose_engine(guest: GuestInfo, *, engine: str = "auto") -> EngineChoice:
    """Choose for ``engine`` "auto", "direct" or "qemu".

    Raises NotSupported if ``direct`` is requested and would lose state, or if no engine can save
    this guest as requested; QemuError if it cannot be saved now; UsageError for another engine.
    """
    if engine not in ("auto", *Engine):
        raise UsageError(f"engine must be auto, direct or qemu, not {engine!r}")
    if (why_not := why_no_migration(guest)) is not None:
        raise QemuError(why_not)
    refused: tuple[str, ...] = ()
    if engine != Engine.QEMU:
        way, refused = _way(guest)
        if way is not None:
            return _direct(guest, way)
        if engine == Engine.DIRECT:
            raise NotSupported(f"engine direct cannot save this guest: {'; '.join(refused)}")
    return _qemu(guest, refused)


def fall_back(guest: GuestInfo, failed: QemuError) -> EngineChoice:
    """Choose engine ``qemu`` after engine ``direct`` has ``failed`` without changing the guest.

    Raises ``failed`` if engine ``qemu`` cannot save it either.
    """
    try:
        return _qemu(guest, (str(failed),))
    except NotSupported:
        raise failed from None


def _way(guest: GuestInfo) -> tuple[DeviceStateMethod | None, tuple[str, ...]]:
    """Return the method that works for this guest, or the reasons why none does."""
    ways = [DeviceStateMethod.IGNORE_SHARED, DeviceStateMethod.DEVICES_ONLY]
    if not guest.running:  # the second keeps its run state
        ways.reverse()
    reasons: list[str] = []
    for way in ways:
        against = _against(guest, way)
        if not against:
            return way, ()
        reasons += [reason for reason in against if reason not in reasons]
    return None, tuple(reasons)


def _against(guest: GuestInfo, way: DeviceStateMethod) -> list[str]:
    missed = missed_devices(guest, way)
    if way is DeviceStateMethod.DEVICES_ONLY:
        return missed + _unreachable(guest.blocks)
    skipped = tuple(block for block in guest.blocks if block.file_backed)
    rest = guest.total_ram - sum(block.length for block in skipped)
    if guest.run_state == "postmigrate":
        missed.append(_POSTMIGRATE)
    if guest.run_state == "suspended":
        missed.append(_SUSPENDED)
    if not skipped:
        missed.append("x-ignore-shared leaves nothing out: no RAM is a shared memory-backend-file")
    elif rest > _LARGEST_REST:
        missed.append(
            f"x-ignore-shared leaves {rest >> 20} MiB in the stream that are not in a shared "
            "memory-backend-file"
        )
    return missed + _unreachable(skipped)


def _unreachable(blocks: tuple[GuestBlock, ...]) -> list[str]:
    why: dict[str, list[str]] = {}
    for block in blocks:
        if block.memory is None:
            why.setdefault(block.why_not, []).append(block.name)
    return [f"{_several(names)}: {reason}" for reason, names in why.items()]


def _several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more blocks"


def _direct(guest: GuestInfo, way: DeviceStateMethod) -> EngineChoice:
    if way is DeviceStateMethod.DEVICES_ONLY:
        why = "all of its RAM can be read"
        if not guest.running:
            why += f", and it stays {guest.run_state}"
        return EngineChoice(Engine.DIRECT, way, why)
    why = "its RAM is shared and file-backed, so QEMU can leave it out"
    if not guest.running:
        why += _ending(guest)
    return EngineChoice(Engine.DIRECT, way, why, stays=guest.running)


def _qemu(guest: GuestInfo, refused: tuple[str, ...]) -> EngineChoice:
    if "mapped-ram" not in guest.capabilities:
        version = ".".join(map(str, guest.version))
        raise NotSupported(f"this QEMU ({version}) has no mapped-ram: it needs 9.0 or later")
    if guest.run_state == "postmigrate":
        raise NotSupported("; ".join((_POSTMIGRATE, *refused)))
    if guest.run_state == "suspended":
        raise NotSupported("; ".join(dict.fromkeys((_SUSPENDED, *refused))))
    why = "engine direct is not possible" if refused else "it was requested"
    if not guest.running:
        why += _ending(guest)
    return EngineChoice(Engine.QEMU, None, why, refused, stays=guest.running)


_POSTMIGRATE = "QEMU does not migrate a guest in postmigrate again: let it run first (cont)"
# QEMU 10.0.2: "invalid runstate transition: 'postmigrate' -> 'suspended'", and it aborts.
_SUSPENDED = (
    "QEMU crashes when a guest that was migrated while suspended resumes: wake it first "
    "(system_wakeup)"
)


def _ending(guest: GuestInfo) -> str:
    return f"; it is {guest.run_state} and will end in postmigrate"
