"""Which features of an x86 processor a guest uses, by the state of its CPUs.

A guest was started with a CPU model, which no file records; but what its kernel switched on is in XCR0, CR4
and EFER, and QEMU adds subsections for registers that not every processor has. Features have the names of
QEMU's CPU properties.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pyqmigrate.format.device.values import Device, State

__all__ = ["CpuUse", "UsedFeature", "cpu_use"]

# Bits of XCR0: the feature, and where its part of the XSAVE area ends (Intel SDM, volume 1, 13.4 and 13.5).
_XCR0 = (
    (2, "avx", 832),
    (3, "mpx", 1024),
    (4, "mpx", 1088),
    (5, "avx512f", 1152),
    (6, "avx512f", 1664),
    (7, "avx512f", 2688),
    (9, "pku", 2696),
    (17, "amx-tile", 2816),
    (18, "amx-tile", 11008),
)
_XSAVE_LEGACY = 576  # bytes: x87, SSE and the header

_CR4 = {
    11: "umip",
    12: "la57",
    13: "vmx",
    16: "fsgsbase",
    17: "pcid",
    18: "xsave",
    20: "smep",
    21: "smap",
    22: "pku",
    24: "pks",
}
_EFER = {0: "syscall", 8: "lm", 11: "nx", 12: "svm", 14: "fxsr-opt"}

_SUBSECTIONS = {
    "cpu/mpx": "mpx",
    "cpu/avx512": "avx512f",
    "cpu/pkru": "pku",
    "cpu/pkrs": "pks",
    "cpu/xss": "xsaves",
    "cpu/umwait": "waitpkg",
    "cpu/spec_ctrl": "spec-ctrl",
    "cpu/virt_ssbd": "virt-ssbd",
    "cpu/intel_pt": "intel-pt",
    "cpu/intel_amx_xtile": "amx-tile",
    "cpu/arch_lbr": "arch-lbr",
    "cpu/fred": "fred",
    "cpu/msr_tscdeadline": "tsc-deadline",
    "cpu/msr_tsc_adjust": "tsc-adjust",
}
# These exist only where KVM gives them to a guest.
_KVM_SUBSECTIONS = (
    "cpu/async_pf_msr",
    "cpu/async_pf_int_msr",
    "cpu/async_pv_eoi_msr",
    "cpu/steal_time_msr",
    "cpu/kvm_nested_state",
    "cpu/msr_hyperv_",
    "cpu/xen_vcpu",
)


@dataclass(frozen=True)
class UsedFeature:
    """A feature that is used, and by what that shows: ``XCR0 bit 2``."""

    name: str
    why: str


@dataclass(frozen=True)
class CpuUse:
    """What all CPUs together use.

    ``xcr0`` is a bit mask, and ``xsave_size`` the bytes of the area that it takes. ``msrs`` are the
    names of QEMU's subsections with registers that not every processor has, ``kvm_only`` those of them
    that only KVM knows.
    """

    cpus: int
    xcr0: int
    xsave_size: int
    features: tuple[UsedFeature, ...]
    msrs: tuple[str, ...]
    kvm_only: tuple[str, ...]


def cpu_use(devices: Iterable[Device]) -> CpuUse | None:
    """Return what the CPUs among ``devices`` use; None if there are no described x86 CPUs."""
    states = [
        device.state for device in devices if device.name == "cpu" and "env.efer" in device.state
    ]
    if not states:
        return None
    xcr0 = 0
    features: dict[str, UsedFeature] = {}
    msrs: dict[str, None] = {}
    for state in states:
        xcr0 |= _number(state, "env.xcr0")
        msrs |= dict.fromkeys(subsection.name for subsection in state.subsections)
        for name, why in _used(state):
            features.setdefault(name, UsedFeature(name, why))
    return CpuUse(
        len(states),
        xcr0,
        max([_XSAVE_LEGACY, *(end for bit, _, end in _XCR0 if xcr0 >> bit & 1)]),
        tuple(features.values()),
        tuple(msrs),
        tuple(name for name in msrs if name.startswith(_KVM_SUBSECTIONS)),
    )


def _used(state: State) -> Iterator[tuple[str, str]]:
    """Yield each feature that a CPU uses, and what shows it."""
    xcr0, cr4, efer = (_number(state, name) for name in ("env.xcr0", "env.cr[4]", "env.efer"))
    for bit, name, _ in _XCR0:
        if xcr0 >> bit & 1:
            yield name, f"XCR0 bit {bit}"
    yield from ((name, f"CR4 bit {bit}") for bit, name in _CR4.items() if cr4 >> bit & 1)
    yield from ((name, f"EFER bit {bit}") for bit, name in _EFER.items() if efer >> bit & 1)
    for subsection in state.subsections:
        if subsection.name in _SUBSECTIONS:
            yield _SUBSECTIONS[subsection.name], f"state {subsection.name}"


def _number(state: State, name: str) -> int:
    value = state.get(name)
    return value if isinstance(value, int) else 0
