"""The features that a guest's CPUs use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyqmigrate.format.device.cpu_features import cpu_use
from tests.harness.cpu_sections import device, fields


def used(xcr0: int = 1, cr4: int = 0, efer: int = 0, *subsections: str) -> dict[str, str]:
    tree = fields({"env.xcr0": xcr0, "env.cr[4]": cr4, "env.efer": efer})
    tree = replace(tree, subsections=tuple(replace(fields({}), name=name) for name in subsections))
    use = cpu_use([device(tree)])
    assert use is not None
    return {feature.name: feature.why for feature in use.features}


@pytest.mark.parametrize(
    ("state", "name", "why"),
    [
        ((7,), "avx", "XCR0 bit 2"),
        ((0xE7,), "avx512f", "XCR0 bit 5"),
        ((1, 1 << 12), "la57", "CR4 bit 12"),
        ((1, 1 << 18), "xsave", "CR4 bit 18"),
        ((1, 0, 0x500), "lm", "EFER bit 8"),
        ((1, 0, 0, "cpu/pkru"), "pku", "state cpu/pkru"),
    ],
)
def test_feature_and_what_shows_it(state: tuple[int, ...], name: str, why: str) -> None:
    assert used(*state)[name] == why


def test_guest_of_the_base_uses_nothing() -> None:
    assert used(3, 0x30, 0, "cpu/poll_control_msr") == {}


@pytest.mark.parametrize(
    ("xcr0", "size"), [(1, 576), (3, 576), (7, 832), (0xE7, 2688), (0x207, 2696)]
)
def test_size_of_the_xsave_area(xcr0: int, size: int) -> None:
    use = cpu_use([device(fields({"env.xcr0": xcr0, "env.cr[4]": 0, "env.efer": 0}))])
    assert use is not None
    assert use.xsave_size == size


def test_cpus_are_taken_together() -> None:
    trees = [fields({"env.xcr0": xcr0, "env.efer": 0}) for xcr0 in (1, 7)]
    use = cpu_use(device(tree, instance=number) for number, tree in enumerate(trees))
    assert use is not None
    assert (use.cpus, use.xcr0) == (2, 7)


def test_what_only_kvm_knows_is_named() -> None:
    tree = fields({"env.efer": 0})
    names = ("cpu/steal_time_msr", "cpu/msr_hyperv_time", "cpu/poll_control_msr")
    tree = replace(tree, subsections=tuple(replace(fields({}), name=name) for name in names))
    use = cpu_use([device(tree)])
    assert use is not None
    assert use.kvm_only == names[:2]


def test_other_processors_are_not_known() -> None:
    assert cpu_use([device(fields({"cpsr": 1}))]) is None
    assert cpu_use([]) is None
