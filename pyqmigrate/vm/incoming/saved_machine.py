"""Facts about the saved machine, from the device sections of a snapshot.

Most need only names and instances of sections, which are known even without a description.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from pyqmigrate.format.device.sections import DeviceSection, run_state_of
from pyqmigrate.format.stream.wire import Section, SectionKind
from pyqmigrate.snapshot.base import Snapshot

__all__ = ["SavedMachine", "read_saved_machine"]

_BODY_MAX = 1 << 16  # bytes of a section that are searched
_X86_CPU = "cpu"
_GLOBAL_STATE = "globalstate"
_KVM_CLOCK = "kvmclock"
_KVM_CPU = b"\x05\x0bcpu/tsc_khz"  # start of a subsection of KVM's processors
# Patterns are strings, compiled when first used: a restore waits for each import.
_X86_MACHINE = r"(pc|isapc|microvm|xenfv)(-|$)"
# On the first root bus: the slots from bridge to bridge, then the name of the device's state.
_PCI = r"0000:00:(?P<slots>[0-9a-f]{2}\.[0-7](?::[0-9a-f]{2}\.[0-7])*)/(?P<state>.+)"


class SavedMachine(NamedTuple):
    """What is known of a saved machine; None for what the file does not show.

    ``run_state`` is the guest's, ``processors`` their number, ``kvm`` whether KVM ran the guest,
    ``kvm_clock`` whether there is a clock section that only KVM loads. ``pci`` has the names of
    device states on the first root bus, by slots (``03.0``, ``02.0:00.0``). ``counts`` is the number
    of states with each name. Both are None if not all sections could be separated.
    """

    run_state: str | None
    processors: int | None
    kvm: bool | None
    kvm_clock: bool
    pci: Mapping[str, frozenset[str]] | None
    counts: Mapping[str, int] | None


def read_saved_machine(snapshot: Snapshot) -> SavedMachine:
    """Read the device sections; raises TargetError if the file cannot be read."""
    stream = snapshot.stream
    sections = [s for s in stream.sections if s.kind in (SectionKind.FULL, SectionKind.START)]
    names = {section.name for section in sections}
    processors = [section for section in sections if section.name == _X86_CPU]
    kvm: bool | None = True if _KVM_CLOCK in names else None
    if kvm is None and processors and re.match(_X86_MACHINE, snapshot.machine):
        kvm = _KVM_CPU in _body(snapshot, processors[0])
    common = {s.instance_id for s in sections if s.name == "cpu_common"}
    counted = common or {s.instance_id for s in processors}
    return SavedMachine(
        run_state=_run_state(snapshot, sections),
        processors=len(counted) if counted and not stream.opaque_tail else None,
        kvm=kvm,
        kvm_clock=_KVM_CLOCK in names,
        pci=None if stream.opaque_tail else _pci(names),
        counts=None if stream.opaque_tail else Counter(s.name for s in sections),
    )


def _run_state(snapshot: Snapshot, sections: list[Section]) -> str | None:
    for section in sections:
        if section.name == _GLOBAL_STATE:
            return run_state_of([DeviceSection(section.name, _body(snapshot, section))])
    return None


def _body(snapshot: Snapshot, section: Section) -> bytes:
    return snapshot.source.read_at(section.body_offset, min(section.body_length, _BODY_MAX))


def _pci(names: set[str]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for name in names:
        if device := re.fullmatch(_PCI, name):
            found.setdefault(device["slots"], set()).add(device["state"])
    return {slots: frozenset(states) for slots, states in found.items()}
