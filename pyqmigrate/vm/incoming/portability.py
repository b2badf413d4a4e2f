"""Whether a snapshot's guest can go on on this host: its CPU features against host and QEMU.

    report = check_host("/snap/guest.mapped", qemu="qemu-system-x86_64")
    print(report.possible, report.obstacles)

No guest is started. What the guest uses is known from its CPUs' state (:mod:`pyqmigrate.format.device
.cpu_features`): a feature that it found at its start and has not switched on in a register (AES, say) does
not show. Give the CPU model that the guest was saved with, which the record of ``vm save`` has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyqmigrate.errors import NotSupported, QemuError, UsageError
from pyqmigrate.format.device.cpu_features import CpuUse, cpu_use
from pyqmigrate.io.target import Target
from pyqmigrate.snapshot.base import Snapshot
from pyqmigrate.snapshot.devices import devices
from pyqmigrate.vm.qemu.cpu_model import cpu_properties

__all__ = ["ACCELERATORS", "DEFAULT_QEMU", "HostReport", "check_host", "host_flags"]

ACCELERATORS = ("kvm", "tcg")
DEFAULT_QEMU = "qemu-system-x86_64"

_KVM = "/dev/kvm"
# Where Linux has another name for a feature than QEMU, after "-" became "_".
_LINUX_NAMES = {"spec_ctrl": "ibrs", "tsc_deadline": "tsc_deadline_timer"}


@dataclass(frozen=True)
class HostReport:
    """What the guest uses, and what stands against it here.

    ``accelerator`` is that of the restore, ``qemu`` the executable that was asked, None if there is none,
    ``model`` the CPU model that was checked. ``missing`` are names of features; ``obstacles`` sentences
    that say what is missing and what to do; ``notes`` what could not be checked.
    """

    use: CpuUse
    accelerator: str
    qemu: str | None
    model: str
    missing: tuple[str, ...]
    obstacles: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def possible(self) -> bool:
        return not self.obstacles


def check_host(
    target: Snapshot | Target,
    *,
    qemu: str | None = None,
    accelerator: str | None = None,
    model: str | None = None,
) -> HostReport:
    """Compare what a snapshot's guest uses with this host's processor and a QEMU, and wait.

    qemu: the executable; by default qemu-system-x86_64, if there is one.
    accelerator: ``kvm`` or ``tcg``; by default KVM if /dev/kvm can be opened.
    model: the CPU model of the restore, as for ``-cpu``; by default only what is possible at all is
        compared (``max``).

    Raises NotSupported for a guest that is not x86, or whose device state has no description;
    SnapshotError, UsageError, TargetError, QemuError if a QEMU that was named cannot be asked.
    """
    if accelerator not in (None, *ACCELERATORS):
        raise UsageError(f"accelerator must be kvm or tcg, not {accelerator!r}")
    use = _use(target)
    notes: list[str] = []
    chosen = accelerator or ("kvm" if os.access(_KVM, os.R_OK | os.W_OK) else "tcg")
    executable = shutil.which(qemu or DEFAULT_QEMU)
    if executable is None and qemu is not None:
        raise UsageError(f"there is no executable {qemu!r}")
    obstacles: dict[str, str] = {}
    if chosen == "kvm":
        obstacles |= _missing_on_host(use, host_flags())
    elif use.kvm_only:
        obstacles["kvm"] = (
            f"the guest uses what only KVM has ({', '.join(use.kvm_only)}): restore it with KVM"
        )
    if executable is None:
        notes.append(f"there is no {DEFAULT_QEMU} here: only the processor was compared")
    else:
        obstacles |= _missing_in_qemu(use, executable, chosen, model, notes, named=qemu is not None)
    return HostReport(
        use,
        chosen,
        executable,
        model or "max",
        tuple(obstacles),
        tuple(obstacles.values()),
        tuple(notes),
    )


def host_flags(path: str | os.PathLike[str] = "/proc/cpuinfo") -> frozenset[str]:
    """Return the feature flags of this host's processor, by Linux's names; empty if it has none."""
    try:
        for line in Path(path).read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "flags":
                return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def _use(target: Snapshot | Target) -> CpuUse:
    try:
        use = cpu_use(devices(target, name="cpu").devices)
    except UsageError as error:
        raise NotSupported(f"what the guest's CPUs use is not known: {error}") from error
    if use is None:
        raise NotSupported("what the guest's CPUs use is only known of x86, with a described state")
    return use


def _missing_on_host(use: CpuUse, flags: frozenset[str]) -> dict[str, str]:
    return {
        feature.name: f"this host's processor has no {feature.name} ({feature.why} of the guest): restore "
        "on a host that has it"
        for feature in use.features
        if flags and _linux_name(feature.name) not in flags
    }


def _linux_name(name: str) -> str:
    linux = name.replace("-", "_")
    return _LINUX_NAMES.get(linux, linux)


def _missing_in_qemu(
    use: CpuUse,
    executable: str,
    accelerator: str,
    model: str | None,
    notes: list[str],
    *,
    named: bool,
) -> dict[str, str]:
    try:
        possible = cpu_properties(executable, accelerator, "max")
        chosen = possible if model is None else cpu_properties(executable, accelerator, model)
    except QemuError as error:
        if named or model is not None:
            raise
        notes.append(f"QEMU was not asked: {error}")
        return {}
    return dict(_obstacles(use, accelerator, model, possible, chosen))


def _obstacles(
    use: CpuUse,
    accelerator: str,
    model: str | None,
    possible: Mapping[str, Any],
    chosen: Mapping[str, Any],
) -> Iterator[tuple[str, str]]:
    for feature in use.features:
        if feature.name not in possible or chosen.get(feature.name) is True:
            continue  # a QEMU that does not know the feature cannot say
        what = f"{feature.name} ({feature.why} of the guest)"
        if possible[feature.name] is not True:
            yield (
                feature.name,
                f"QEMU with {accelerator} cannot give the guest {what}: restore it with KVM, on a host "
                "whose processor has it",
            )
        else:
            yield (
                feature.name,
                f"CPU model {model!r} does not have {what}: add +{feature.name} to -cpu, or use the model "
                "that the guest was saved with",
            )
